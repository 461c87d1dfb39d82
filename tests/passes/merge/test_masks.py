"""What is kept of a change, beside NumPy's sorts, and what chance does on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.passes.merge.masks import by_chance, by_chance_and_size, by_size, marks, without_outliers
from xlathe.passes.merge.ranks import find_band

RNG = np.random.default_rng(0)
DELTA = RNG.normal(size=(8, 250)).astype(np.float32)
KEY = jax.random.key(3)


def test_what_is_no_number_is_larger_than_all() -> None:
    values = np.array([1.0, np.nan, np.inf, -np.nan, 2.0], np.float32)
    largest = marks(values, find_band(lambda: [values], 0, 3))
    np.testing.assert_array_equal(largest, [False, True, True, True, False])


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 1e-9])
def test_a_density_keeps_at_least_one_number(density: float) -> None:
    kept = np.asarray(by_size(DELTA, density=density))
    assert np.count_nonzero(kept) == max(int(density * DELTA.size), 1)
    assert np.abs(kept[kept != 0]).min() >= np.abs(DELTA[kept == 0]).max(initial=0)
    np.testing.assert_array_equal(kept[kept != 0], DELTA[kept != 0])


def test_what_makes_up_for_the_rest() -> None:
    l1 = np.asarray(by_size(DELTA, density=0.1, rescale="l1"))
    assert np.abs(l1).sum() == pytest.approx(np.abs(DELTA).sum(), rel=1e-5)
    divided = np.asarray(by_size(DELTA, density=0.1, rescale="keep_prob"))
    np.testing.assert_allclose(divided[divided != 0], DELTA[divided != 0] / 0.1, rtol=1e-6)
    assert not np.any(by_size(0 * DELTA, density=0.1, rescale="l1"))


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1])
def test_outliers_are_dropped(gamma: float) -> None:
    kept = np.asarray(without_outliers(DELTA, density=0.3, gamma=gamma))
    order = np.argsort(-np.abs(DELTA), axis=None, kind="stable")[int(gamma * 2000) :][:600]
    expected = np.zeros(2000, np.float32)
    expected[order] = DELTA.reshape(-1)[order]
    np.testing.assert_array_equal(kept, expected.reshape(DELTA.shape))


@pytest.mark.parametrize("size", [1, 5, 99])
def test_a_tiny_tensor_keeps_its_share(size: int) -> None:
    """gamma is less than one number of it: nothing is an outlier, where others drop all of it."""
    delta = DELTA.reshape(-1)[:size]
    np.testing.assert_array_equal(without_outliers(delta, density=1.0), delta)


def test_chance_keeps_the_mean() -> None:
    """Of 400 seeds, within four standard errors of it everywhere but in one number of ten thousand."""
    keys = jax.random.split(KEY, 400)
    mean = np.mean([by_chance(key, DELTA, density=0.4) for key in keys], axis=0)
    error = np.abs(DELTA) * np.sqrt(0.6 / 0.4 / 400)
    assert np.mean(np.abs(mean - DELTA) > 4 * error) < 1e-3


def test_chance_rises_with_rank_in_a_row() -> None:
    keys = jax.random.split(KEY, 400)
    drawn = np.mean([np.asarray(by_chance_and_size(k, DELTA, density=0.5, epsilon=0.4)) != 0 for k in keys], axis=0)
    ranks = np.argsort(np.argsort(np.abs(DELTA), axis=1), axis=1)
    expected = 0.1 + 0.8 * ranks / 249
    assert np.abs(drawn - expected).max() < 5 * np.sqrt(0.25 / 400)
    mean = np.mean([by_chance_and_size(k, DELTA, density=0.5, epsilon=0.4) for k in keys], axis=0)
    error = np.abs(DELTA) * np.sqrt((1 - expected) / expected / 400)
    assert np.mean(np.abs(mean - DELTA) > 4 * error) < 2e-3


@pytest.mark.parametrize("drop", [by_chance, by_chance_and_size])
def test_rows_are_drawn_by_their_places(drop) -> None:
    whole = np.asarray(drop(KEY, DELTA, density=0.5))
    parts = [drop(KEY, DELTA[start : start + 3], density=0.5, row=start) for start in range(0, 8, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(whole[0] != 0, whole[1] != 0)


def test_rows_of_one_number_have_the_density() -> None:
    column = np.ones((4000, 1), np.float32)
    kept = np.asarray(by_chance_and_size(KEY, column, density=0.5, rescale="none"))
    assert np.isfinite(kept).all() and kept.mean() == pytest.approx(0.5, abs=0.04)
    assert by_chance_and_size(KEY, jnp.float32(2.0), density=0.999, epsilon=0.0005) == pytest.approx(2 / 0.999)
