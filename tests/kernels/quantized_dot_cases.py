"""Operands for the kernels of quantized_dot in bfloat16, and how far from the truth a kernel may be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.ops.quantized_dot import quantized_dot as operation
from xlathe.storage import parse_format

Kernel = Callable[..., jax.Array]
INT8 = {"format": "int8:channel"}


def operands(rows: int, n: int, k: int, *, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x and codes of 8 bits, with their scales."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, k)), jnp.bfloat16)
    codes = jnp.asarray(rng.integers(-127, 128, (n, k)), jnp.int8)
    return x, codes, jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32)


def check(kernel: Kernel, sizes: tuple[int, int, int]) -> None:
    """With codes of 8 bits products are exact, and only the order of sums is the kernel's."""
    args = operands(*sizes)
    actual, expected = (f(*args, out_dtype="float32", **INT8) for f in (kernel, operation.body))
    assert jnp.max(jnp.abs(actual - expected)) <= 1e-6 * jnp.max(jnp.abs(expected))


def check_leading_axes_and_the_dtype_of_the_result(kernel: Kernel) -> None:
    x, codes, scale = operands(6, 128, 128)
    expected = operation.body(x, codes, scale, out_dtype="bfloat16", **INT8)
    actual = kernel(x.reshape(2, 3, 128), codes, scale, out_dtype="bfloat16", **INT8)
    assert actual.shape == (2, 3, 128) and actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual.reshape(6, 128), expected)


def int4_operands(rows: int, n: int, k: int, group: int, *, zeros: bool, seed: int = 0) -> tuple[jax.Array, ...]:
    """All codes and zero points, scales of both signs, and a few activations thirty times larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) * np.where(rng.random((rows, k)) < 0.02, 30.0, 1.0)
    scale = rng.uniform(0.5, 1.5, (n, k // group)) * rng.choice([-1, 1], (n, k // group))
    zero = [jnp.asarray(rng.integers(0, 16, scale.shape), jnp.uint8)] * zeros
    codes = jnp.asarray(rng.integers(0, 256, (n, k // 2)), jnp.uint8)
    return jnp.asarray(x, jnp.bfloat16), codes, jnp.asarray(scale, jnp.bfloat16), *zero


def check_int4(kernel: Kernel, sizes: tuple[int, int, int], group: int, *, zeros: bool, out_dtype: str) -> None:
    """At most twice as far from float32 as a product with the weight rounded to bfloat16, for each row of codes.

    And 1e-6 of the largest result more, as the order of float32 sums is the kernel's: bfloat16 has all weights of some
    rows, and where it adds in the order of the body it is no error away.
    """
    args = int4_operands(*sizes, group, zeros=zeros)
    text = f"int4:g{group}{',asym' * zeros}"
    exact = operation.body(*args, out_dtype="float32", format=text)
    weight = parse_format(text).dequantize(*args[1:]).astype(jnp.bfloat16)
    plain = jnp.einsum("mk,nk->mn", args[0], weight, preferred_element_type=jnp.float32).astype(out_dtype)
    actual = kernel(*args, out_dtype=out_dtype, format=text)
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    error, allowed = (jnp.max(jnp.abs(y.astype(jnp.float32) - exact), axis=0) for y in (actual, plain))
    assert jnp.all(error <= 2 * allowed + 1e-6 * jnp.max(jnp.abs(exact)))


def check_int4_by_units(kernel: Kernel, n: int, k: int, group: int) -> None:
    """Rows of the identity read the weight out, each rounded to bfloat16 once."""
    args = int4_operands(1, n, k, group, zeros=True)[1:]
    text = f"int4:g{group},asym"
    actual = kernel(jnp.eye(k, dtype=jnp.bfloat16), *args, out_dtype="float32", format=text)
    weight = parse_format(text).dequantize(*args).astype(jnp.bfloat16)
    np.testing.assert_array_equal(actual.T, weight.astype(jnp.float32))


INT4 = {"format": "int4:g32,asym"}
GOOD = {"x": "bfloat16 2 128", "codes": "int8 64 128", "scale": "float32 64"}
GOOD_INT4 = {"x": "bfloat16 2 128", "codes": "uint8 64 64", "scale": "bfloat16 64 4", "zero": "uint8 64 4"}
REFUSED: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"x": "float32 2 128"}, {}, r"found float32\[2, 128\], int8\[64, 128\], float32\[64\]"),
    ({"codes": "uint8 64 128"}, {}, r"expected .* codes int8 .* found .* uint8\[64, 128\]"),
    ({"codes": "int8 64 127"}, {}, r"found .* int8\[64, 127\]"),
    ({"scale": "float32 63"}, {}, r"found .* float32\[63\]"),
    ({"zero": "int8 64"}, {}, r"found .* int8\[64\]"),
    ({"x": "bfloat16 0 128"}, {}, "no axis to be empty"),
    ({}, {"out_dtype": "float16"}, "found float16"),
    ({}, {"format": "int3:g32"}, "found int3:g32"),
    ({}, {"format": "int8:g32"}, "found int8:g32"),
    (GOOD_INT4, {"format": "int4:channel"}, "found int4:channel"),
    (GOOD_INT4, {"format": "int4:g16"}, "found int4:g16"),
    (GOOD_INT4, INT4 | {"activations": "int8"}, "found them rounded to int8"),
    (GOOD_INT4 | {"codes": "int8 64 64"}, INT4, r"expected .* codes uint8 .* found .* int8\[64, 64\]"),
    (GOOD_INT4 | {"scale": "float32 64 4"}, INT4, r"found .* float32\[64, 4\]"),
    (GOOD_INT4 | {"zero": "uint8 64 2"}, INT4, r"found .* uint8\[64, 2\]"),
    (GOOD_INT4 | {"x": "bfloat16 2 144", "codes": "uint8 64 72"}, INT4, r"found bfloat16\[2, 144\]"),
]
