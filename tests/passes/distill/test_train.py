"""Training a student: what a step is, how it goes on, and over how many devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.passes.distill import models
from tests.passes.distill.models import tokens
from xlathe.errors import OptionError, PassError, RequestError
from xlathe.graph import Graph
from xlathe.passes.distill import train
from xlathe.passes.distill.features import Kept, pair_features
from xlathe.passes.distill.objective import Objective
from xlathe.passes.distill.rows import Rows
from xlathe.passes.distill.step import Lesson, Piece, Settings, Total, make_add, trained_names
from xlathe.passes.distill.stored import store_teacher
from xlathe.passes.distill.train import Moment, distill
from xlathe.verify import compare

ROWS = Rows.cut(tokens(), 8)
teacher, student = (functools.partial(each, layers=1) for each in (models.teacher, models.student))  # compiled sooner


STEPS = 4
SETTINGS = Settings(STEPS * 32)


@functools.cache
def uninterrupted() -> tuple[Graph, np.ndarray]:
    return distill(student(), ROWS, lesson(), SETTINGS)


def lesson(text: str = "forward_kl") -> Lesson:
    return Lesson(Objective.parse(text), teacher())


def weights(graph: Graph) -> dict[str, np.ndarray]:
    return {name: np.asarray(graph.weights[name]) for name in graph.names("weight")}


def assert_same(found: Graph, expected: Graph) -> None:
    for name, array in weights(expected).items():
        np.testing.assert_array_equal(found.weights[name], array, err_msg=name)


def farthest(found: Graph, expected: Graph) -> float:
    a, b = weights(found), weights(expected)
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in b)


def test_the_student_comes_closer_to_its_teacher_and_only_its_weights_change() -> None:
    before = student()
    after, losses = uninterrupted()
    apart = [compare(teacher(), graph, ROWS.tokens[:8]).kl.mean for graph in (before, after)]
    assert losses.shape == (STEPS,) and apart[1] < 0.9 * apart[0]
    assert after.jaxpr is before.jaxpr and after.names("weight") == before.names("weight")
    assert after.history[-1].name == "distill" and "forward_kl" in after.report()


def test_pieces_of_a_step_are_the_whole_step() -> None:
    pieces, losses = distill(student(), ROWS, lesson(), Settings(STEPS * 32, rows=1, accumulate=4))
    assert farthest(pieces, uninterrupted()[0]) < 1e-4
    np.testing.assert_allclose(losses, uninterrupted()[1], rtol=1e-5)


def test_padding_changes_no_step() -> None:
    """A row of which only a part is there beside the same rows with other tokens in what is not."""
    ids, mask = ROWS.tokens.copy(), np.arange(8) < np.arange(len(ROWS.tokens))[:, None] % 8 + 1
    short = Rows(ids, mask)
    ids = np.where(np.pad(mask, ((0, 0), (1, 0)), constant_values=True), ids, 7)
    expected, losses = distill(student(), short, lesson(), SETTINGS)
    found, other = distill(student(), Rows(ids, mask), lesson(), SETTINGS)
    np.testing.assert_array_equal(other, losses)
    assert_same(found, expected)


class _Stop(Exception):
    pass


def test_interrupted_and_gone_on_is_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, losses = uninterrupted()
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 0.0)
    taken: list[int] = []

    def stop(moment: Moment) -> None:
        taken.append(moment.step)
        if moment.step == 2:
            raise _Stop

    with pytest.raises(_Stop):
        distill(student(), ROWS, lesson(), SETTINGS, workdir=tmp_path, report=stop)
    found, gone_on = distill(student(), ROWS, lesson(), SETTINGS, workdir=tmp_path, report=stop)
    assert taken == [1, 2, 3, 4]
    np.testing.assert_array_equal(gone_on, losses)
    assert_same(found, expected)
    assert_same(distill(student(), ROWS, lesson(), SETTINGS, workdir=tmp_path, report=stop)[0], expected)
    assert len(taken) == 4
    _, others = distill(student(), Rows.cut(tokens(seed=1), 8), lesson(), SETTINGS, workdir=tmp_path)
    assert others[0] != losses[0]  # another run


def test_stored_logits_teach_as_those_of_the_step(tmp_path: Path) -> None:
    stored = store_teacher(teacher(), ROWS, 61, 2.0, tmp_path)
    objective = Objective.parse("top_k{k=61,temperature=2.0}")
    _, expected = distill(student(), ROWS, Lesson(objective, teacher()), SETTINGS)
    _, found = distill(student(), ROWS, Lesson(objective, stored=stored), SETTINGS)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # float16 logarithms, to half a unit of 2^-8


def test_features_are_those_that_pruning_kept() -> None:
    """A teacher whose stream is zero elsewhere, and a student that is the rest of it."""
    kept = np.array([i for i in range(32) if i % 4])
    large, sliced = dict(models.teacher().arrays), {}
    for name in models.teacher().names("weight"):
        axis = 1 if name.split("/")[-2] in ("embedding", "output", "down") else 0
        factor = np.sqrt(32 / 24) if name.endswith("scale") else 1  # of the mean square
        if axis:
            large[name] = large[name] * np.isin(np.arange(32), kept)
        sliced[name] = np.take(np.asarray(large[name]), kept, axis) * factor
    narrow = models.teacher(width=24).with_weights({name: np.float32(array) for name, array in sliced.items()})
    whole = models.teacher().with_weights({name: np.float32(large[name]) for name in sliced})
    pairs = pair_features(narrow, whole, Kept(width=tuple(kept.tolist())))
    add = make_add(narrow, Lesson(Objective.parse("features"), whole, pairs))
    trained = {name: np.asarray(narrow.arrays[name]) for name in trained_names(narrow)}
    total = Total({name: np.zeros_like(array) for name, array in trained.items()}, np.float32(0), np.float32(0))
    fixed = {name: array for name, array in narrow.arrays.items() if name not in trained}
    found = add(total, trained, (fixed, whole.arrays), Piece(ROWS.tokens[:2], ROWS.mask[:2], None))
    assert found.tokens == 16 and found.loss / found.tokens < 1e-5


def test_two_devices_make_what_one_does(tmp_path: Path) -> None:
    expected, losses = uninterrupted()
    script = (
        "import jax, numpy as np\n"
        "from tests.passes.distill.test_train import ROWS, SETTINGS, lesson, student, weights, distill\n"
        "assert jax.device_count() == 2\n"
        "graph, losses = distill(student(), ROWS, lesson(), SETTINGS)\n"
        f"np.savez({str(tmp_path / 'found.npz')!r}, losses=losses, **weights(graph))\n"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    for name, array in weights(expected).items():
        np.testing.assert_allclose(found[name], array, atol=1e-4 * np.abs(array).max())


def test_what_cannot_be_trained() -> None:
    with pytest.raises(OptionError, match="tokens must be a positive whole number, got 0"):
        Settings(0)
    with pytest.raises(OptionError, match="learning_rate must be a positive number"):
        Settings(8, learning_rate=-1.0)
    with pytest.raises(OptionError, match="seed must be a whole number of at least 0, got -1"):
        Settings(8, seed=-1)
    with pytest.raises(OptionError, match="expected rows of at least 1 token, got a length of 0"):
        Rows.cut(tokens(), 0)
    with pytest.raises(OptionError, match="forward_kl asks for a teacher, and the lesson has none"):
        distill(student(), ROWS, Lesson(Objective.parse("forward_kl")), SETTINGS)


def test_a_teacher_of_shorter_rows_is_asked_for_none(tmp_path: Path) -> None:
    short = teacher().replace(max_len=7)
    with pytest.raises(RequestError, match="7"):
        distill(student(), ROWS, Lesson(Objective.parse("forward_kl"), short), SETTINGS)
    with pytest.raises(RequestError, match="7"):
        store_teacher(short, ROWS, 4, 1.0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_training_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 0.0)
    with pytest.raises(PassError, match="step 2 left a loss or weights that are not finite, at a learning rate of"):
        distill(student(), ROWS, lesson(), Settings(STEPS * 32, learning_rate=1e38), workdir=tmp_path)
    assert [path.name for path in tmp_path.glob("*/[0-9]*")] == ["1"]
