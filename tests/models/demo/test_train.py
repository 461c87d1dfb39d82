"""Training on a tiny configuration: it learns, and resumes exactly."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from xlathe.models.demo import files, train
from xlathe.models.llama import LlamaConfig

TINY = LlamaConfig(vocab=32, width=16, layers=1, query_heads=2, key_value_heads=1, head_dim=8, hidden=32)
PLAN = train.Plan(steps=40, decay_steps=1, rows=2, context=16, learning_rate=0.02)
TOKENS = np.tile(np.arange(32), 20)


@pytest.fixture(scope="module")
def initial() -> train.Params:
    return train.initialize(TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def trained(initial: train.Params, folder: Path) -> train.Params:
    return train.fit(TINY, PLAN, initial, TOKENS, TOKENS[:33], folder / "straight")


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    initial: train.Params, trained: train.Params, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = train.batch

    def interrupted(tokens: np.ndarray, step: int, plan: train.Plan) -> np.ndarray:
        if step == 5:
            raise KeyboardInterrupt
        return batch(tokens, step, plan)

    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_EVERY", 0)
        patch.setattr(train, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.fit(TINY, PLAN, initial, TOKENS, TOKENS[:33], folder / "resumed")
    assert 5 in ocp.utils.checkpoint_steps(folder / "resumed")
    resumed = train.fit(TINY, PLAN, initial, TOKENS, TOKENS[:33], folder / "resumed")
    jax.tree.map(np.testing.assert_array_equal, resumed, trained)


def test_training_lowers_the_loss(initial: train.Params, trained: train.Params) -> None:
    loss, rows = train.make_loss(TINY), train.batch(TOKENS, 0, PLAN)
    assert loss(trained, rows) < 0.5 * loss(initial, rows)


def test_written_weights_are_the_trained_ones_in_float16(trained: train.Params, folder: Path) -> None:
    read = files.read(folder / "straight.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float16), b), trained, read)


def test_every_window_is_seen_once_an_epoch() -> None:
    windows = (len(TOKENS) - 1) // PLAN.context
    numbered = np.arange(len(TOKENS))
    rows = [train.batch(numbered, step, dataclasses.replace(PLAN, rows=1)) for step in range(windows)]
    assert sorted(int(row[0, 0]) for row in rows) == [i * PLAN.context for i in range(windows)]
    assert (rows[0][0] == rows[0][0, 0] + np.arange(PLAN.context + 1)).all()


def test_a_grown_model_computes_the_same(trained: train.Params) -> None:
    deep = train.grow(trained, 3)
    assert list(deep["layers"]) == [0, 1, 2]
    rows = train.batch(TOKENS, 0, PLAN)
    before = train.make_loss(TINY)(trained, rows)
    np.testing.assert_allclose(train.make_loss(dataclasses.replace(TINY, layers=3))(deep, rows), before, rtol=1e-6)
