"""Sums of changes, beside the papers' formulas written out in NumPy, and laws that every method obeys."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from xlathe.passes.merge.statistics import fisher, regmean
from xlathe.passes.merge.tasks import change, elected, nearswap, sce, summed

RNG = np.random.default_rng(0)
DELTAS = list(RNG.normal(size=(3, 7, 20)).astype(np.float32))
WEIGHTS = [0.5, 0.3, 0.9]


def test_changes_are_taken_in_float32() -> None:
    """In bfloat16 the difference of 1.0078125 * 3 and 3 would be rounded again."""
    tensor, base = (np.array([value], ml_dtypes.bfloat16) for value in (100.5, 0.015))
    expected = np.float32(tensor) - np.float32(base)
    assert change(tensor, base)[0] == expected[0] != np.float32((tensor - base).astype(ml_dtypes.bfloat16))[0]


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(normalize: bool) -> None:
    expected = np.tensordot(WEIGHTS, DELTAS, 1) / (sum(WEIGHTS) if normalize else 1)
    np.testing.assert_allclose(summed(DELTAS, WEIGHTS, normalize=normalize), expected, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.6, 0.4]])
def test_ties(weights: Sequence[float], normalize: bool) -> None:
    expected = np.zeros((7, 20))
    for at in np.ndindex(7, 20):
        terms = [w * float(d[at]) for w, d in zip(weights, DELTAS, strict=True)]
        sign = -1 if sum(terms) < 0 else 1
        agreeing = [(abs(w), term) for w, term in zip(weights, terms, strict=True) if term * sign > 0]
        if agreeing:
            expected[at] = sum(term for _, term in agreeing) / (sum(w for w, _ in agreeing) if normalize else 1)
    found = np.asarray(elected(DELTAS, weights, normalize=normalize))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.all(found * np.tensordot(weights, DELTAS, 1) >= 0)  # also with a negative weight


def test_zeros_are_of_no_sign() -> None:
    """A tie is elected +, and what is 0 neither agrees nor counts."""
    deltas = [jnp.array([1.0, -1.0, 0.0, 0.0]), jnp.array([-1.0, 0.0, 0.0, 2.0])]
    np.testing.assert_array_equal(elected(deltas, [1, 1]), [1.0, -1.0, 0.0, 2.0])


@pytest.mark.parametrize("select", [1.0, 0.25])
def test_sce(select: float) -> None:
    deltas = np.stack(DELTAS).astype(np.float64)
    variance = deltas.var(axis=0)
    chosen = variance >= np.sort(variance, axis=None)[-int(select * variance.size)]
    kept = deltas * chosen
    energy = (kept**2).mean(axis=(1, 2))
    weights = (energy / energy.sum())[:, None, None] * (np.sign(kept) == np.sign(kept.sum(axis=0)))
    total = weights.sum(axis=0)
    expected = np.where(chosen, (weights * kept).sum(axis=0) / np.where(total > 0, total, 1), 0)
    np.testing.assert_allclose(sce(DELTAS, select=select), expected, atol=1e-6)
    assert not np.any(sce([0 * d for d in DELTAS], select=select))


def test_nearswap() -> None:
    base, other = DELTAS[:2]
    share = np.minimum(0.3 / np.abs(other.astype(np.float64) - base), 1)
    np.testing.assert_allclose(nearswap(base, other, 0.3), base + share * (other - base), atol=1e-6)
    np.testing.assert_array_equal(nearswap(base, base, 0.0), base)


def test_fisher_weighs_each_number() -> None:
    information = [np.where(RNG.random(d.shape) < 0.5, 0, np.abs(d)).astype(np.float32) for d in DELTAS]
    information[0][0] = information[1][0] = information[2][0] = 0
    total = sum(information)
    plain = sum(d.astype(np.float64) for d in DELTAS) / 3
    weighed = sum(f * d.astype(np.float64) for f, d in zip(information, DELTAS, strict=True))
    expected = np.where(total > 0, weighed / np.where(total > 0, total, 1), plain)
    np.testing.assert_allclose(fisher(DELTAS, information), expected, atol=1e-5)


def test_regmean_has_the_least_error_of_products() -> None:
    """Expected: where the gradient of the errors is 0, by float64; a column without activations is the mean's."""
    rows = [RNG.normal(size=(40, 20)) @ np.diag(RNG.random(20) + 0.1) for _ in DELTAS]
    for x in rows:
        x[:, 3] = 0
    grams = [(x.T @ x) for x in rows]
    found = np.asarray(regmean(DELTAS, [g.astype(np.float32) for g in grams], 0.8), np.float64)
    shrunk = [0.8 * g + 0.2 * np.diag(np.diag(g)) for g in grams]
    gradient = sum((found - w) @ g for w, g in zip(DELTAS, shrunk, strict=True))
    scale = sum(np.abs(w) @ np.abs(g) for w, g in zip(DELTAS, shrunk, strict=True)).max()
    assert np.abs(gradient).max() <= 1e-5 * scale
    np.testing.assert_allclose(found[:, 3], np.mean(DELTAS, axis=0)[:, 3], atol=1e-6)
    # Expected of equal products: the plain mean.
    same = regmean(DELTAS, [np.eye(20, dtype=np.float32)] * 3)
    np.testing.assert_allclose(same, np.mean(DELTAS, axis=0), atol=1e-5)


METHODS: dict[str, Callable[[list[Any]], jax.Array]] = {
    "task_arithmetic": lambda deltas: summed(deltas, [1 / len(deltas)] * len(deltas)),
    "ties": lambda deltas: elected(deltas, [1.0] * len(deltas)),
    "sce": sce,
    "fisher": lambda deltas: fisher(deltas, [np.ones_like(d) for d in deltas]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_merging_a_model_with_itself_is_the_model(name: str, count: int) -> None:
    np.testing.assert_allclose(METHODS[name]([DELTAS[0]] * count), DELTAS[0], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    np.testing.assert_allclose(METHODS[name](DELTAS), METHODS[name](DELTAS[::-1]), atol=1e-6)
