"""The reference body of quantized_dot: each format and each rounding of activations beside NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from xlathe.ops.activations import round_tokens
from xlathe.ops.quantized_dot import EXPANDED, quantized_dot
from xlathe.storage import parse_format

FORMATS = ["int8:channel", "int8:g32,asym", "int3:g32", "fp8_e4m3:b128x128", "nf4:g64", "mxfp8", "nvfp4", "bf16"]


def operands(form: str, m: int, n: int, k: int) -> tuple[np.ndarray, list[jax.Array], np.ndarray]:
    """x with an outlier in each row, the parts of a weight, and the weight that they stand for."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, 3] *= 50
    stored = parse_format(form)
    parts = [jnp.asarray(part) for part in stored.encode(rng.standard_normal((n, k)).astype(np.float32))]
    return x, parts, np.asarray(stored.dequantize(*parts))


def rounded(x: np.ndarray, activations: str | None, step: float) -> np.ndarray:
    """x as its scheme holds it, float64."""
    if activations is None:
        return x.astype(np.float64)
    last = 127 if activations.startswith("int8") else 448
    if activations.endswith("_static"):
        steps = np.float32(step)
    else:
        steps = np.abs(x).max(axis=-1, keepdims=True) / np.float32(last)
    scaled = np.clip(x / steps, -last, last)
    levels = np.rint(scaled) if last == 127 else scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return levels * steps.astype(np.float64)


@pytest.mark.parametrize("activations", [None, "int8_token", "fp8_token", "int8_static", "fp8_static"])
@pytest.mark.parametrize("form", FORMATS)
def test_equals_numpy(form: str, activations: str | None) -> None:
    x, parts, weight = operands(form, 5, 72, 128)
    step = 0.01
    extra = [jnp.float32(step)] if activations and activations.endswith("static") else []
    options = {"out_dtype": "float32", "format": form, "activations": activations}
    found = jax.jit(lambda *a: quantized_dot(*a, **options))(x, *parts, *extra)
    expected = rounded(x, activations, step) @ weight.astype(np.float64).T
    tie = 2e-4 if activations else 2e-6  # a number in the middle of two levels may become either
    assert np.abs(found - expected).max() <= tie * np.abs(expected).max()
    if activations:
        assert np.abs(expected - x @ weight.T).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("activations", ["int8_token", "fp8_token"])
def test_levels_are_those_of_a_cast(activations: str) -> None:
    x = np.random.default_rng(1).standard_normal((7, 96)).astype(np.float32)
    x[2], x[3] = 0, 1e-38
    levels, steps = jax.jit(lambda x: round_tokens(x, activations))(x)
    dtype, last = (np.int8, 127) if activations == "int8_token" else (ml_dtypes.float8_e4m3fn, 448)
    inverse = np.where(np.abs(x).max(-1) > 1e-30, last / np.maximum(np.abs(x).max(-1), 1e-30), 0).astype(np.float32)
    scaled = x * inverse[:, None]
    expected = (np.rint(scaled) if last == 127 else scaled).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(levels, expected)
    assert not np.asarray(levels)[2:4].any() and np.isfinite(steps).all()


@pytest.mark.parametrize("form", ["int4:g32", "fp8_e4m3:b128x128", "fp8_e4m3:tensor", "nvfp4"])
def test_a_large_weight_is_never_expanded_whole(form: str) -> None:
    """Expected: no float array of n x k numbers in the program, and the product of all rows, also of the last ones."""
    n, k = 2200, 1024
    assert n * k > 2 * EXPANDED
    x, parts, weight = operands(form, 3, n, k)
    found = jax.jit(lambda *a: quantized_dot(*a, out_dtype="float32", format=form))
    text = found.lower(x, *parts).as_text()
    assert f"{n}x{k}xf32" not in text and "1024x1024xf32" in text
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(found(x, *parts) - expected).max() <= 2e-6 * np.abs(expected).max()


def test_w8a8_gives_a_row_the_same_bits_in_any_batch() -> None:
    x, parts, _ = operands("int8:channel", 128, 96, 512)
    run = jax.jit(
        lambda x, *p: quantized_dot(x, *p, out_dtype="float32", format="int8:channel", activations="int8_token")
    )
    whole = np.asarray(run(x, *parts))
    for m in (1, 8):
        np.testing.assert_array_equal(run(x[:m], *parts), whole[:m])
