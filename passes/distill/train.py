"""Trains the weights of a student graph towards a teacher graph on rows of text."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Record
from xlathe.passes.distill.optimizer import make_optimizer
from xlathe.passes.distill.rows import Rows
from xlathe.passes.distill.sampled import Sampler, check_sampled, is_own, make_sampler, own_seed
from xlathe.passes.distill.step import Lesson, Piece, Settings, State, Total, make_add, make_update, trained_names
from xlathe.passes.quantize.work import digest_of

CHECKPOINT_EVERY = 120.0  # seconds
SPEED_OVER = 20  # steps that tokens a second are measured over


@dataclasses.dataclass(frozen=True)
class Moment:
    """How far training is, and the loss of the last step, a token."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


def distill(
    student: Graph,
    rows: Rows,
    lesson: Lesson,
    settings: Settings,
    *,
    workdir: Path | None = None,
    report: Callable[[Moment], None] = lambda moment: None,
) -> tuple[Graph, np.ndarray]:
    """Returns the student with trained weights, and the loss of each step, float32 [steps].

    Weights are trained as float32 and put back as the dtypes that the graph has; those that are no floats stay.
    workdir: for checkpoints. With the same arguments training goes on from the last one there and ends with the same
    bits; runs with other arguments have folders of their own.

    Raises OptionError where rows do not share out among the devices, where the student has nothing to train and where
    a teacher is missing; RequestError for rows that do not fit student or teacher; PassError where a loss or the
    weights are no longer finite: the last checkpoint is of a step before that.
    """
    _check(student, rows, lesson, settings)
    steps = settings.steps(rows.length)
    optimizer = make_optimizer(student, settings.learning_rate, steps)
    add, update = make_add(student, lesson), make_update(optimizer)
    spread, copied = _shardings()
    weights = {name: jnp.array(student.arrays[name], jnp.float32) for name in trained_names(student)}
    state = State(jnp.int32(0), weights, optimizer.init(weights), jnp.zeros(steps, jnp.float32))
    fixed = {name: array for name, array in student.arrays.items() if name not in weights}
    constants = jax.device_put((fixed, {} if lesson.teacher is None else lesson.teacher.arrays), copied)
    state, clock = jax.device_put(state, copied), _Clock(steps, settings.rows * settings.accumulate * rows.length)
    sampler = make_sampler(student, settings.rows, rows.length) if settings.on_policy else None
    with _checkpoints(workdir, student, rows, lesson, settings) as checkpoints:
        state = checkpoints.load(state)
        for step in range(int(state.step), steps):
            total = Total(jax.tree.map(jnp.zeros_like, state.weights), jnp.float32(0), jnp.float32(0))
            for part in range(settings.accumulate):
                number = step * settings.accumulate + part
                piece = _piece(rows, lesson, settings, number)
                if sampler is not None and is_own(settings, step):
                    piece = _own(piece, sampler, student, state, own_seed(settings, number))
                total = add(total, state.weights, constants, jax.device_put(piece, spread))
            state = update(state, total)
            loss = _finite(float(state.losses[step]), step, settings)
            checkpoints.save(state, step + 1, last=step + 1 == steps)
            report(clock.tick(step + 1, loss))
    note = f"{lesson.objective}: {steps:,} steps of {clock.tokens:,} tokens at {settings.learning_rate:g}"
    if settings.on_policy:
        note += f", {sum(is_own(settings, step) for step in range(steps)):,} of them on the student's own text"
    return _put_back(student, state, note, clock.seconds), np.asarray(state.losses)


def _check(student: Graph, rows: Rows, lesson: Lesson, settings: Settings) -> None:
    devices = jax.device_count()
    if settings.rows % devices:
        raise OptionError(f"distill: rows={settings.rows} do not share out among {devices} devices; give a multiple")
    if not trained_names(student):
        raise OptionError("distill: the student has no weights in floats; train before quantizing")
    if lesson.objective.needs_teacher and lesson.teacher is None and lesson.stored is None:
        raise OptionError(f"distill: {lesson.objective} asks for a teacher, and the lesson has none")
    for graph in (student, lesson.teacher):
        if graph is not None:
            graph.check_batch(rows.tokens[:, :-1])
    if settings.on_policy:
        check_sampled(student, lesson, rows.length)


def _finite(loss: float, step: int, settings: Settings) -> float:
    if not math.isfinite(loss):
        raise PassError(
            f"distill: step {step + 1} left a loss or weights that are not finite, at a learning rate of "
            f"{settings.learning_rate:g}; a smaller one may help"
        )
    return loss


def _shardings() -> tuple[jax.sharding.NamedSharding, jax.sharding.NamedSharding]:
    """Returns how rows lie on the devices, shared out, and how weights do: each has them all."""
    mesh = jax.make_mesh((jax.device_count(),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.P("rows")), jax.sharding.NamedSharding(mesh, jax.P())


def _piece(rows: Rows, lesson: Lesson, settings: Settings, number: int) -> Piece:
    tokens, mask, places = rows.at(number, settings.rows, settings.seed)
    return Piece(tokens, mask, None if lesson.stored is None else lesson.stored.at(places))


def _own(piece: Piece, sampler: Sampler, student: Graph, state: State, seed: int) -> Piece:
    weights = jax.device_get({name: value.astype(student.aval(name).dtype) for name, value in state.weights.items()})
    tokens, mask = sampler.go_on(weights, piece.tokens, piece.mask, seed)
    return Piece(tokens, mask, None)


def _put_back(student: Graph, state: State, note: str, seconds: float) -> Graph:
    """Returns the student with the weights of a state, and what was done in its history."""
    trained = {name: value.astype(student.aval(name).dtype) for name, value in state.weights.items()}
    size = len(student.jaxpr.eqns)
    record = Record("distill", {"weight": len(trained)}, notes=(note,), seconds=seconds, equations=(size, size))
    return student.with_weights(jax.device_get(trained)).replace(history=(*student.history, record))


@dataclasses.dataclass
class _Checkpoints:
    """States on disk, from time to time; without a manager nowhere."""

    manager: ocp.CheckpointManager | None
    saved: float = dataclasses.field(default_factory=time.monotonic)

    def load(self, state: State) -> State:
        """Returns the last one; `state` is its like, and what training begins with where there is none."""
        if self.manager is None or (step := self.manager.latest_step()) is None:
            return state
        found = self.manager.restore(step, args=ocp.args.StandardRestore(state))
        assert isinstance(found, State)
        return found

    def save(self, state: State, step: int, last: bool) -> None:
        if self.manager is not None and (last or time.monotonic() - self.saved >= CHECKPOINT_EVERY):
            self.manager.save(step, args=ocp.args.StandardSave(state))
            self.saved = time.monotonic()


@contextlib.contextmanager
def _checkpoints(
    workdir: Path | None, student: Graph, rows: Rows, lesson: Lesson, settings: Settings
) -> Iterator[_Checkpoints]:
    if workdir is None:
        yield _Checkpoints(None)
        return
    folder = workdir.absolute() / _digest(student, rows, lesson, settings)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        yield _Checkpoints(manager)


def _digest(student: Graph, rows: Rows, lesson: Lesson, settings: Settings) -> str:
    """Returns what tells a run apart from all that would give other weights."""
    texts = [str(each) for each in (lesson.objective, settings, lesson.pairs.kept)]
    texts.append("none" if lesson.stored is None else lesson.stored.digest)
    data = {"tokens": rows.tokens, "mask": rows.mask}
    for graph in (student, lesson.teacher):
        if graph is not None:
            texts.append(graph.structural_hash)
            data |= {f"{len(texts)}:{name}": np.asarray(array) for name, array in graph.arrays.items()}
    return digest_of("", texts, data)


@dataclasses.dataclass
class _Clock:
    """Measures the speed over the last steps.

    steps: in all, before a restart too; tokens: of a step.
    """

    steps: int
    tokens: int
    begun: float = dataclasses.field(default_factory=time.monotonic)
    times: list[float] = dataclasses.field(default_factory=lambda: [time.monotonic()])

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.begun

    def tick(self, step: int, loss: float) -> Moment:
        self.times = [*self.times, time.monotonic()][-SPEED_OVER - 1 :]
        a_step = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return Moment(step, self.steps, loss, self.tokens / a_step, (self.steps - step) * a_step)
