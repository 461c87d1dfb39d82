"""Training on what the student writes itself: which tokens are learned, and that runs are the same bits."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.passes.distill import models
from tests.passes.distill.models import VOCAB, tokens
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.distill import train
from xlathe.passes.distill.objective import Objective
from xlathe.passes.distill.rows import Rows
from xlathe.passes.distill.sampled import Sampler, is_own, make_sampler
from xlathe.passes.distill.step import Lesson, Settings
from xlathe.passes.distill.train import Moment, distill

ROWS = Rows.cut(tokens(), 8)
STEPS = 12
OWN = Settings(STEPS * 32, on_policy=1.0)
teacher, student = (functools.partial(each, layers=1) for each in (models.teacher, models.student))


def lesson(text: str = "reverse_kl") -> Lesson:
    return Lesson(Objective.parse(text), teacher())


@functools.cache
def sampler() -> Sampler:
    return make_sampler(student(), 4, 8)


@functools.cache
def trained() -> tuple[Graph, np.ndarray]:
    return distill(student(), ROWS, lesson(), OWN)


def arrays(graph: Graph) -> dict[str, np.ndarray]:
    return {name: np.asarray(graph.arrays[name]) for name in graph.names("weight")}


def reverse_kl(graph: Graph) -> float:
    """Returns KL(student || teacher) a token that the student wrote, in nats: NumPy on the logits."""
    values = []
    for seed in range(8):
        ids, mask = sampler().go_on(arrays(graph), ROWS.tokens[4 * seed :][:4], ROWS.mask[:4], seed)
        log_s, log_t = (
            logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for logits in (np.asarray(each(ids[:, :-1]), np.float64) for each in (graph, teacher()))
        )
        values.append((np.exp(log_s) * (log_s - log_t)).sum(-1)[mask])
    return float(np.concatenate(values).mean())


def test_the_second_half_of_a_row_is_what_the_student_of_now_writes() -> None:
    other = student().with_weights({name: np.roll(array, 1, -1) for name, array in arrays(student()).items()})
    ids, mask = sampler().go_on(arrays(other), ROWS.tokens[:4], ROWS.mask[:4], 5)
    program = xl.compile(other, max_batch=4, max_len=8, chunks=(16,), unit=4, stop_tokens=())
    expected = program.generate(ROWS.tokens[:4, :4], max_tokens=4, temperature=1.0, seed=5)
    np.testing.assert_array_equal(ids[:, :4], ROWS.tokens[:4, :4])
    np.testing.assert_array_equal(ids[:, 4:8], [each.tokens for each in expected])
    np.testing.assert_array_equal(mask, [[False] * 3 + [True] * 4 + [False]] * 4)
    before, _ = sampler().go_on(arrays(student()), ROWS.tokens[:4], ROWS.mask[:4], 5)
    assert (before != ids).any()


def test_nothing_is_learned_after_a_prompt_that_is_not_whole() -> None:
    mask = np.arange(8) < np.array([[2], [3], [4], [8]])  # with the first token, 3, 4, 5 and 9 are there
    _, found = sampler().go_on(arrays(student()), ROWS.tokens[:4], mask, 5)
    assert found.any(1).tolist() == [False, True, True, True]


def test_the_student_comes_closer_to_its_teacher_on_its_own_text() -> None:
    after, losses = trained()
    assert reverse_kl(after) < 0.9 * reverse_kl(student())
    assert losses.shape == (STEPS,) and f"{STEPS} of them on the student's own text" in after.history[-1].notes[0]


@pytest.mark.parametrize("text", ["forward_kl", "jsd{beta=0.5}"])
def test_steps_on_the_text_are_as_ever(text: str) -> None:
    some = Settings(2 * 32, on_policy=0.5, seed=1)
    assert [is_own(some, step) for step in range(2)] == [False, True]  # drawn
    assert not any(is_own(dataclasses.replace(some, on_policy=0.0), step) for step in range(100))
    _, mixed = distill(student(), ROWS, lesson(text), some)
    _, plain = distill(student(), ROWS, lesson(text), dataclasses.replace(some, on_policy=0.0))
    assert mixed[0] == plain[0] and mixed[1] != plain[1]


class _Stop(Exception):
    pass


def test_interrupted_and_gone_on_is_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 0.0)

    def stop(moment: Moment) -> None:
        if moment.step == 5:
            raise _Stop

    with pytest.raises(_Stop):
        distill(student(), ROWS, lesson(), OWN, workdir=tmp_path, report=stop)
    found, losses = distill(student(), ROWS, lesson(), OWN, workdir=tmp_path)
    np.testing.assert_array_equal(losses, trained()[1])
    for name, array in arrays(trained()[0]).items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


def test_what_cannot_be_learned_from_own_text() -> None:
    with pytest.raises(OptionError, match="on_policy must be a fraction of 0 to 1, got 2"):
        Settings(8, on_policy=2)
    with pytest.raises(OptionError, match="leave out cross_entropy"):
        distill(student(), ROWS, lesson("forward_kl,cross_entropy"), OWN)
    with pytest.raises(OptionError, match="expected rows of at least 2 tokens"):
        distill(student(), Rows.cut(tokens(), 1), lesson(), OWN)
    narrow = Lesson(Objective.parse("forward_kl"), models.teacher(vocab=VOCAB - 1, layers=1))
    with pytest.raises(OptionError, match="may write any of 61 tokens, and the teacher reads 60"):
        distill(student(), Rows.cut(tokens() % 60, 8), narrow, OWN)
