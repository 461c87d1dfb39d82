"""Methods that choose scales alone: weighted search, HQQ, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.passes.quantize.methods.awq import clip_ranges
from xlathe.passes.quantize.methods.grid import Grid, Params
from xlathe.passes.quantize.methods.hqq import NORM, STEPS, hqq, shrink
from xlathe.passes.quantize.methods.search import search_scales


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size=(24, 96))


def grid(bits: int = 3, symmetric: bool = True, stored: str = "float64") -> Grid:
    return Grid(bits, 32, symmetric, stored)


def squares(w: np.ndarray, params: Params, on: Grid) -> np.ndarray:
    """Squared errors [n, groups, group]."""
    return np.square(w - np.asarray(on.nearest(jnp.asarray(w), params))).reshape(len(w), -1, on.group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", ["bfloat16", "float64"])
@pytest.mark.parametrize("bits", [2, 4])
def test_search_never_loses_and_wins_much_at_few_bits(bits: int, stored: str, symmetric: bool) -> None:
    on, w = grid(bits, symmetric, stored), weight()
    importance = np.random.default_rng(1).chisquare(1, size=96)
    heed = importance.reshape(-1, 32)
    found = (squares(w, search_scales(jnp.asarray(w), jnp.asarray(importance), on), on) * heed).sum(-1)
    nearest = (squares(w, on.fit(jnp.asarray(w)), on) * heed).sum(-1)
    assert (found <= nearest * (1 + 1e-12)).all()
    assert found.sum() < (0.65 if bits == 2 else 0.9) * nearest.sum()


def test_search_finds_the_best_scale_by_brute_force() -> None:
    """Beside 20,000 scales a group, each with its own codes, the search is within 2 %."""
    on, w = grid(), weight()[:2]
    groups = w.reshape(-1, 1, 32)
    largest = groups[np.arange(len(groups)), 0, np.abs(groups[:, 0]).argmax(-1)]
    tried = np.linspace(0.2, 1.3, 20_000)[None] * largest[:, None] / -4
    codes = np.clip(np.rint(groups / tried[..., None]), -4, 3)
    best = np.square(groups - codes * tried[..., None]).sum(-1).min(-1)
    found = squares(w, search_scales(jnp.asarray(w), jnp.ones(96), on), on).sum(-1).reshape(-1)
    assert (found <= 1.02 * best).all()


def test_hqq_by_its_definition() -> None:
    on, w = grid(), weight()
    values = w.reshape(24, 3, 32)
    scale = np.asarray(on.fit(jnp.asarray(w)).scale)[..., None]
    iterates = [scale]
    for _ in range(STEPS):
        codes = np.clip(np.rint(values / scale), -4, 3)
        error = values - codes * scale
        split = np.sign(error) * np.maximum(np.abs(error) - np.maximum(np.abs(error), 1e-12) ** (0.7 - 1) / 10, 0)
        scale = ((values - split) * codes).sum(-1, keepdims=True) / np.square(codes).sum(-1, keepdims=True)
        iterates.append(scale)
    losses = [(np.abs(values - np.clip(np.rint(values / s), -4, 3) * s) ** NORM).sum(-1) for s in iterates]
    best = np.take_along_axis(np.stack(iterates)[..., 0], np.argmin(losses, axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(hqq(jnp.asarray(w), on).scale, best, rtol=1e-9)
    assert np.min(losses, axis=0).sum() < 0.99 * losses[0].sum()


def test_soft_threshold() -> None:
    """With p = 1 it were the soft threshold at 1 / beta; with p below 1 large errors shrink less than small ones."""
    found = np.asarray(shrink(jnp.asarray([-2.0, -0.1, 0.0, 0.01, 5.0])))
    np.testing.assert_allclose(found, [-2 + 2**-0.3 / 10, 0.0, 0.0, 0.0, 5 - 5**-0.3 / 10], atol=1e-12)


@pytest.mark.parametrize("method", ["search", "hqq", "clip"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(method: str, symmetric: bool) -> None:
    on, w = grid(symmetric=symmetric), weight()
    w[3, 32:64] = 0
    w[5] = 0
    given = jnp.asarray(w)
    params = {
        "search": lambda: search_scales(given, jnp.zeros(96), on),
        "hqq": lambda: hqq(given, on),
        "clip": lambda: clip_ranges(given, jnp.eye(96), on),
    }[method]()
    rounded = np.asarray(on.nearest(given, params))
    assert not rounded[5].any() and not rounded[3, 32:64].any() and np.isfinite(rounded).all()


def test_clipping_is_the_best_of_its_ranges() -> None:
    on, w = grid(), weight()
    x = np.random.default_rng(3).normal(size=(200, 96)) @ np.random.default_rng(4).normal(size=(96, 96))
    errors = []
    for i in range(10):
        low, high = (np.asarray(side) * (1 - i / 20) for side in on.extent(jnp.asarray(w)))
        rounded = np.asarray(on.nearest(jnp.asarray(w), on.span(low, high)))
        difference = (w - rounded).reshape(24, 3, 32)
        errors.append(np.square(np.einsum("ngi,tgi->ngt", difference, x.reshape(-1, 3, 32))).sum(-1))
    params = clip_ranges(jnp.asarray(w), jnp.asarray(x.T @ x), on)
    difference = (w - np.asarray(on.nearest(jnp.asarray(w), params))).reshape(24, 3, 32)
    found = np.square(np.einsum("ngi,tgi->ngt", difference, x.reshape(-1, 3, 32))).sum(-1)
    np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=1e-9)
    assert found.sum() < 0.95 * errors[0].sum()
