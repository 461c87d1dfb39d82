"""One step of training: sums of losses and gradients over pieces of a batch, then the optimizer."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.distill import losses
from xlathe.passes.distill.features import NO_PAIRS, Pairs
from xlathe.passes.distill.objective import Objective, Seen, Taught
from xlathe.passes.distill.stored import StoredTeacher

Arrays = Mapping[str, Any]
Constants = tuple[Arrays, Arrays]
"""What the student has beside trained weights, and all that the teacher has."""


@final
@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how a student is trained.

    tokens: of text in all, rounded up to whole steps; rows: computed at once, shared out evenly among all devices;
    accumulate: so many times these make a step, with the gradient of all of them together; learning_rate: the highest;
    on_policy: the fraction of the steps whose rows the student goes on with itself; seed: of the order of rows and of
    what it writes, 0 or more.
    """

    tokens: int
    rows: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-3
    seed: int = 0
    on_policy: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "accumulate"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"distill: {name} must be a positive whole number, got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"distill: learning_rate must be a positive number, got {self.learning_rate!r}")
        if not (isinstance(self.on_policy, int | float) and 0 <= self.on_policy <= 1):
            raise OptionError(f"distill: on_policy must be a fraction of 0 to 1, got {self.on_policy!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise OptionError(f"distill: seed must be a whole number of at least 0, got {self.seed!r}")

    def steps(self, length: int) -> int:
        """The steps that it takes on rows of this length."""
        return -(-self.tokens // (self.rows * self.accumulate * length))


@final
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What is learned from whom.

    teacher: a forward graph, or None where the objective needs none; pairs: what its term `features` compares;
    stored: the teacher's likeliest tokens on these rows, which the term `top_k` then reads instead of asking it.
    """

    objective: Objective
    teacher: Graph | None = None
    pairs: Pairs = NO_PAIRS
    stored: StoredTeacher | None = None


class State(NamedTuple):
    """What a checkpoint holds; losses: float32 [steps], of the steps taken, nan where weights are not finite since."""

    step: jax.Array
    weights: dict[str, jax.Array]
    optimizer: optax.OptState
    losses: jax.Array


class Total(NamedTuple):
    """Sums over the tokens of a step so far."""

    gradient: dict[str, jax.Array]
    loss: jax.Array
    tokens: jax.Array


class Piece(NamedTuple):
    """Rows that are computed at once: tokens [rows, t + 1], mask [rows, t], and what is stored of their teacher."""

    tokens: Any
    mask: Any
    top: losses.TopK | None


def make_add(student: Graph, lesson: Lesson) -> Callable[..., Total]:
    """Returns what adds a piece to the sums of a step, compiled."""
    dtypes = {name: student.aval(name).dtype for name in trained_names(student)}
    own, see = ir.expose(student.jaxpr, lesson.pairs.student), _make_teacher(lesson)

    def loss(weights: Arrays, constants: Constants, piece: Piece) -> tuple[jax.Array, jax.Array]:
        fixed, teacher_arrays = constants
        batch = {"tokens": piece.tokens[:, :-1]}
        cast = {name: value.astype(dtypes[name]) for name, value in weights.items()}
        logits, *features = student.evaluate(own, {**fixed, **cast}, batch)
        taught = jax.lax.stop_gradient(see(teacher_arrays, batch))._replace(top=piece.top)
        values = lesson.objective.values(Seen(logits, tuple(features)), taught, piece.tokens[:, 1:])
        return losses.masked_sum(values, piece.mask)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Total, weights: Arrays, constants: Constants, piece: Piece) -> Total:
        (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(weights, constants, piece)
        return jax.tree.map(jnp.add, total, Total(gradient, value, count))

    return add


def make_update(optimizer: optax.GradientTransformation) -> Callable[[State, Total], State]:
    """Returns what takes a step, compiled."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, total: Total) -> State:
        count = jnp.maximum(total.tokens, 1)
        gradient = jax.tree.map(lambda g: g / count, total.gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
        weights: Any = optax.apply_updates(state.weights, updates)
        finite = jnp.stack([jnp.isfinite(each).all() for each in weights.values()]).all()
        loss = jnp.where(finite, total.loss / count, jnp.nan)
        return State(state.step + 1, weights, optimizer_state, state.losses.at[state.step].set(loss))

    return update


def _make_teacher(lesson: Lesson) -> Callable[[Arrays, Arrays], Taught]:
    teacher, pairs = lesson.teacher, lesson.pairs
    if teacher is None:
        return lambda arrays, batch: Taught()
    jaxpr = ir.expose(teacher.jaxpr, pairs.teacher)

    def see(arrays: Arrays, batch: Arrays) -> Taught:
        logits, *features = teacher.evaluate(jaxpr, arrays, batch)
        if pairs.kept.width is not None:
            features = [feature[..., np.asarray(pairs.kept.width)] for feature in features]
        return Taught(logits, None, tuple(features))

    return see


def trained_names(graph: Graph) -> list[str]:
    """Returns the weights in floats."""
    return [name for name in graph.names("weight") if jnp.issubdtype(graph.aval(name).dtype, jnp.floating)]
