"""GPTQ against Optimal Brain Surgeon written out column by column, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import PassError
from xlathe.passes.quantize.algorithms.blocks import output_error, rounded
from xlathe.passes.quantize.algorithms.gptq import gptq, inverse_factor
from xlathe.storage import Scaled, parse_format

INT4 = Scaled("int4", 1, 16, "f32")  # f32: scales are not rounded
ROWS, COLUMNS = 12, 96


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, size=(ROWS, COLUMNS))


def activations(condition: float, tokens: int = 400, seed: int = 1) -> np.ndarray:
    """Float64 [tokens, columns] whose second moments have eigenvalues from 1 to 1 / condition."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(COLUMNS, COLUMNS)))
    return rng.normal(size=(tokens, COLUMNS)) * np.geomspace(1, condition**-0.5, COLUMNS) @ basis


def brain_surgeon(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rounds column after column; the rest moves by -(w_q - r) / [H^-1]_qq * [H^-1]_q, and H^-1 loses row q."""
    weight, inverse = weight.copy(), np.linalg.inv(gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(COLUMNS))
    found = np.zeros_like(weight)
    for q in order:
        step = scale[:, q // INT4.columns]
        found[:, q] = np.clip(np.rint(weight[:, q] / step), -8, 7) * step
        weight -= np.outer(weight[:, q] - found[:, q], inverse[q] / inverse[q, q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return found


def run(weight: np.ndarray, gram: np.ndarray, stored: Scaled = INT4, **options) -> np.ndarray:
    steps = stored.fit(jnp.asarray(weight))
    levels, moved, _ = gptq(weight, gram, stored, steps, **options)
    np.testing.assert_array_equal(levels, stored.nearest(moved, *stored.spread(steps, weight.shape)))
    return np.asarray(stored.values(levels, *stored.spread(steps, weight.shape)))


def to_nearest(weight: np.ndarray, stored: Scaled = INT4) -> np.ndarray:
    return np.asarray(rounded(jnp.asarray(weight), stored.fit(jnp.asarray(weight)), stored))


@pytest.mark.parametrize("act_order", [False, True])
def test_equals_optimal_brain_surgeon(act_order: bool) -> None:
    w, x = weight(), activations(1e4)
    gram = x.T @ x
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(COLUMNS)
    expected = brain_surgeon(w, gram, np.asarray(INT4.fit(jnp.asarray(w)).scale), order)
    np.testing.assert_allclose(run(w, gram, act_order=act_order), expected, atol=1e-9)


@pytest.mark.parametrize("text", ["int2:g32,asym", "int8", "nvfp4", "nf4:g32", "fp8_e4m3:b8x32"])
def test_is_round_to_nearest_where_channels_are_independent(text: str) -> None:
    stored = parse_format(text)
    np.testing.assert_array_equal(run(weight(), np.eye(COLUMNS), stored), to_nearest(weight(), stored))


@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_gives_weight_error_for_output_error(condition: float) -> None:
    w, x = weight(), activations(condition)
    gram = x.T @ x
    nearest = to_nearest(w)
    found = run(w, gram)
    assert np.square(w - found).sum() > np.square(w - nearest).sum()
    assert np.square((w - found) @ x.T).sum() < (0.9 if condition < 1e3 else 0.3) * np.square((w - nearest) @ x.T).sum()


def test_does_not_depend_on_the_block() -> None:
    w, x = weight(), activations(1e3)
    whole, *others = (run(w, x.T @ x, block=block) for block in (COLUMNS, 1, 20, 32))
    for other in others:
        np.testing.assert_allclose(other, whole, rtol=0, atol=1e-12)


def test_a_dead_channel_is_rounded_to_nearest() -> None:
    w, x = weight(), activations(1e3)
    x[:, [3, 40]] = 0
    found, nearest = run(w, x.T @ x), to_nearest(w)
    np.testing.assert_array_equal(found[:, [3, 40]], nearest[:, [3, 40]])
    assert (found != nearest).any()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_activations_does_not_matter_beside_a_dead_channel(size: float) -> None:
    w, x = weight(), activations(1e3)
    x[:, 3] = 0
    np.testing.assert_array_equal(run(w, size * (x.T @ x)), run(w, x.T @ x))


def test_a_group_of_zeros_stays_zero() -> None:
    w, x = weight(), activations(10)
    w[2, 16:32] = 0
    assert not run(w, x.T @ x)[2, 16:32].any()
    assert not run(np.zeros_like(w), x.T @ x).any()


def test_factor_of_the_inverse() -> None:
    x = activations(1e3)
    gram = x.T @ x
    upper, damping = inverse_factor(gram)
    order = np.random.default_rng(0).permutation(COLUMNS)
    np.testing.assert_array_equal(inverse_factor(gram, order).upper, inverse_factor(gram[np.ix_(order, order)]).upper)
    assert damping == 0.01 and not np.tril(upper, -1).any()
    damped = gram / np.diagonal(gram).mean() + damping * np.eye(COLUMNS)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(COLUMNS), atol=1e-10)


def test_damping_rises_until_there_is_a_factor() -> None:
    """Fewer tokens than channels are singular and need no more; rounding errors may leave a negative eigenvalue."""
    x = activations(10, tokens=5)
    gram = x.T @ x
    assert inverse_factor(gram).damping == 0.01
    indefinite = gram - 0.05 * np.diagonal(gram).mean() * np.eye(COLUMNS)
    assert inverse_factor(np.where(np.eye(COLUMNS) > 0, np.maximum(indefinite, 0), indefinite)).damping == 0.1


def test_refuses_what_is_no_sum_of_squares() -> None:
    with pytest.raises(PassError, match="not finite"):
        inverse_factor(np.full((3, 3), np.nan))
    with pytest.raises(PassError, match=r"is singular: no Cholesky factor with 0\.01, 0\.1, 1\.0 of its mean"):
        inverse_factor(np.array([[1.0, 5.0], [5.0, 1.0]]))


def test_output_error_is_that_of_the_products() -> None:
    w, x = weight(), activations(10)
    whole = np.round(w)
    expected = np.square((w - whole) @ x.T).sum()
    np.testing.assert_allclose(output_error(jnp.asarray(w), whole, x.T @ x), expected, rtol=1e-12)
