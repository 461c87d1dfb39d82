"""Scaling and rotation: a channel a hundred times louder than the others, and functions that stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.passes.quantize.algorithms.awq import awq_scales, normalized
from xlathe.passes.quantize.algorithms.blocks import rounded
from xlathe.passes.quantize.algorithms.rotation import hadamard, random_rotation
from xlathe.passes.quantize.algorithms.smooth import smooth_scales
from xlathe.storage import parse_format

INT4 = parse_format("int4:g32")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def loud() -> tuple[np.ndarray, np.ndarray]:
    """Activations [tokens, 64] with one channel x100, and weights [48, 64]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 64))
    x[:, 17] *= 100
    return x, rng.normal(size=(48, 64))


def nearest(weight: np.ndarray) -> np.ndarray:
    return np.asarray(rounded(jnp.asarray(weight), INT4.fit(jnp.asarray(weight)), INT4))


def error(x: np.ndarray, weight: np.ndarray, found: np.ndarray) -> float:
    return float(np.square(x @ (weight - found).T).mean())


def test_awq_wins_with_a_loud_channel(loud) -> None:
    x, weight = loud
    scales = awq_scales([jnp.asarray(weight)], np.abs(x).mean(0), x.T @ x, INT4)
    assert error(x, weight, nearest(weight * scales) / scales) < 0.1 * error(x, weight, nearest(weight))
    assert scales.argmax() == 17


def test_awq_scales_are_the_best_of_twenty_one(loud) -> None:
    x, weight = loud
    tried = [normalized(np.abs(x).mean(0) ** (i / 20)) for i in range(21)]
    np.testing.assert_array_equal(tried[0], np.ones(64))
    best = min(error(x, weight, nearest(weight * s) / s) for s in tried)
    scales = awq_scales([jnp.asarray(weight)], np.abs(x).mean(0), x.T @ x, INT4)
    np.testing.assert_allclose(error(x, weight, nearest(weight * scales) / scales), best, rtol=1e-9)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Rounds rows of activations to 8 bits."""
    step = np.abs(values).max(-1, keepdims=True) / 127
    return np.rint(values / step) * step


def test_smoothing_wins_where_activations_are_rounded(loud) -> None:
    x, weight = loud
    scales = smooth_scales([weight], np.abs(x).max(0), 0.5)
    plain, smooth = (np.square(eight_bits(x / s) @ eight_bits(weight * s).T - x @ weight.T).mean() for s in (1, scales))
    assert smooth < 0.1 * plain


def test_smooth_scales_by_their_definition(loud) -> None:
    x, weight = loud
    absmax, other = np.abs(x).max(0), 3 * weight[:5]
    absmax[4] = 0
    found = smooth_scales([weight, other], absmax, 0.8)
    largest = np.maximum(np.abs(weight).max(0), np.abs(other).max(0))
    np.testing.assert_allclose(np.delete(found, 4), np.delete(absmax**0.8 / largest**0.2, 4), rtol=1e-12)
    assert found[4] == 1


def test_rotation_wins_where_activations_are_rounded(loud) -> None:
    x, weight = loud
    turn = random_rotation(64, seed=0)
    np.testing.assert_allclose((x @ turn) @ (weight @ turn).T, x @ weight.T, atol=1e-11)
    plain, turned = (np.square(eight_bits(x @ q) @ (weight @ q).T - x @ weight.T).mean() for q in (np.eye(64), turn))
    assert turned < 0.2 * plain


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 60, 96, 256, 768, 1024])
def test_hadamard(size: int) -> None:
    found = hadamard(size)
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, size * np.eye(size))


@pytest.mark.parametrize("size", [16, 92, 768, 6])
def test_rotations_are_orthogonal(size: int) -> None:
    """92 and 6 have no matrix here; a rotation is drawn for them."""
    turn, other = random_rotation(size, seed=3), random_rotation(size, seed=4)
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-12)
    assert np.abs(turn - other).max() > 0.01
    np.testing.assert_array_equal(turn, random_rotation(size, seed=3))


def test_sizes_without_a_hadamard_matrix() -> None:
    with pytest.raises(OptionError, match="no Hadamard matrix of 6 rows"):
        hadamard(6)
