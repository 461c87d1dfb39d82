"""Methods that choose scales alone: weighted search, HQQ, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.passes.quantize.algorithms.awq import clip_ranges
from xlathe.passes.quantize.algorithms.blocks import rounded
from xlathe.passes.quantize.algorithms.hqq import ITERATIONS, NORM, hqq, shrink
from xlathe.passes.quantize.algorithms.search import search_steps
from xlathe.storage import Scaled, Steps, parse_format


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size=(24, 96))


INT3 = Scaled("int3", 1, 32, "f32")  # f32: scales are not rounded


def squares(w: np.ndarray, steps: Steps, stored: Scaled) -> np.ndarray:
    """Squared errors [n, groups, 32]."""
    return np.square(w - np.asarray(rounded(jnp.asarray(w), steps, stored))).reshape(len(w), -1, 32)


@pytest.mark.parametrize("text", ["int2:g32,asym", "int4:g32", "int4:g32,z=f16", "nvfp4", "int4:b4x32"])
def test_search_never_loses_and_wins_much(text: str) -> None:
    stored, w = parse_format(text), weight()
    importance = np.random.default_rng(1).chisquare(1, size=96)
    heed = importance.reshape(-1, 32)
    found = (squares(w, search_steps(jnp.asarray(w), jnp.asarray(importance), stored), stored) * heed).sum(-1)
    nearest = (squares(w, stored.fit(jnp.asarray(w)), stored) * heed).sum(-1)
    if stored.rows == 1:
        assert (found <= nearest * (1 + 1e-12)).all()
    assert found.sum() < (0.65 if "int2" in text else 0.9) * nearest.sum()


def test_search_finds_the_best_scale_by_brute_force() -> None:
    """Beside 20,000 scales a group, each with its own codes, the search is within 2 %."""
    on, w = INT3, weight()[:2]
    groups = w.reshape(-1, 1, 32)
    largest = groups[np.arange(len(groups)), 0, np.abs(groups[:, 0]).argmax(-1)]
    tried = np.linspace(0.2, 1.3, 20_000)[None] * largest[:, None] / -4
    codes = np.clip(np.rint(groups / tried[..., None]), -4, 3)
    best = np.square(groups - codes * tried[..., None]).sum(-1).min(-1)
    found = squares(w, search_steps(jnp.asarray(w), jnp.ones(96), on), on).sum(-1).reshape(-1)
    assert (found <= 1.02 * best).all()


def test_hqq_by_its_definition() -> None:
    on, w = INT3, weight()
    values = w.reshape(24, 3, 32)
    scale = np.asarray(on.fit(jnp.asarray(w)).scale)[..., None]
    iterates = [scale]
    for _ in range(ITERATIONS):
        codes = np.clip(np.rint(values / scale), -4, 3)
        error = values - codes * scale
        split = np.sign(error) * np.maximum(np.abs(error) - np.maximum(np.abs(error), 1e-12) ** (0.7 - 1) / 10, 0)
        scale = ((values - split) * codes).sum(-1, keepdims=True) / np.square(codes).sum(-1, keepdims=True)
        iterates.append(scale)
    losses = [(np.abs(values - np.clip(np.rint(values / s), -4, 3) * s) ** NORM).sum(-1) for s in iterates]
    best = np.take_along_axis(np.stack(iterates)[..., 0], np.argmin(losses, axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(hqq(jnp.asarray(w), on).scale, best, rtol=1e-9)
    assert np.min(losses, axis=0).sum() < 0.99 * losses[0].sum()


def test_hqq_with_a_fractional_zero_point_as_published() -> None:
    """The loop of the blog: the inverse scale stays, and zero = mean(q - (w - e) * inverse scale)."""
    stored, w = Scaled("int3", 1, 32, "f32", "f16"), weight()
    values = w.reshape(24, 3, 32)
    low, high = np.minimum(values.min(-1, keepdims=True), 0), np.maximum(values.max(-1, keepdims=True), 0)
    inverse = 7 / (high - low)
    zero, losses, zeros = np.float16(-low * inverse).astype(float), [], []
    for _ in range(ITERATIONS + 1):
        codes = np.clip(np.rint(values * inverse + zero), 0, 7)
        error = values - (codes - zero) / inverse
        losses.append((np.abs(error) ** NORM).sum(-1))
        zeros.append(zero[..., 0])
        split = np.sign(error) * np.maximum(np.abs(error) - np.maximum(np.abs(error), 1e-12) ** (0.7 - 1) / 10, 0)
        zero = np.float16(np.mean(codes - (values - split) * inverse, axis=-1, keepdims=True)).astype(float)
    best = np.take_along_axis(np.stack(zeros), np.argmin(losses, axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(hqq(jnp.asarray(w), stored).zero, best, rtol=1e-9)
    assert np.min(losses, axis=0).sum() < 0.99 * losses[0].sum()


def test_soft_threshold() -> None:
    """With p = 1 it were the soft threshold at 1 / beta; with p below 1 large errors shrink less than small ones."""
    found = np.asarray(shrink(jnp.asarray([-2.0, -0.1, 0.0, 0.01, 5.0])))
    np.testing.assert_allclose(found, [-2 + 2**-0.3 / 10, 0.0, 0.0, 0.0, 5 - 5**-0.3 / 10], atol=1e-12)


@pytest.mark.parametrize("method", ["search", "hqq", "clip"])
@pytest.mark.parametrize("text", ["int3:g32", "int3:g32,asym", "int3:g32,z=bf16"])
def test_zeros_stay_zeros(method: str, text: str) -> None:
    on, w = parse_format(text), weight()
    w[3, 32:64] = 0
    w[5] = 0
    given = jnp.asarray(w)
    steps = {
        "search": lambda: search_steps(given, jnp.zeros(96), on),
        "hqq": lambda: hqq(given, on),
        "clip": lambda: clip_ranges(given, jnp.eye(96), on),
    }[method]()
    found = np.asarray(rounded(given, steps, on))
    assert not found[5].any() and not found[3, 32:64].any() and np.isfinite(found).all()


def test_clipping_is_the_best_of_its_ranges() -> None:
    on, w = INT3, weight()
    x = np.random.default_rng(3).normal(size=(200, 96)) @ np.random.default_rng(4).normal(size=(96, 96))
    errors = []
    for i in range(10):
        low, high = (jnp.asarray(side) * (1 - i / 20) for side in on.bounds(jnp.asarray(w)))
        difference = (w - np.asarray(rounded(jnp.asarray(w), on.steps(low, high), on))).reshape(24, 3, 32)
        errors.append(np.square(np.einsum("ngi,tgi->ngt", difference, x.reshape(-1, 3, 32))).sum(-1))
    steps = clip_ranges(jnp.asarray(w), jnp.asarray(x.T @ x), on)
    difference = (w - np.asarray(rounded(jnp.asarray(w), steps, on))).reshape(24, 3, 32)
    found = np.square(np.einsum("ngi,tgi->ngt", difference, x.reshape(-1, 3, 32))).sum(-1)
    np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=1e-9)
    assert found.sum() < 0.95 * errors[0].sum()
