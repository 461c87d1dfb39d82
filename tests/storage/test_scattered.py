"""Weights of which a known number is zero, wherever, beside NumPy that unpacks them bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.ops.quantized_dot import EXPANDED, quantized_dot
from xlathe.ops.quantized_ragged_dot import quantized_ragged_dot
from xlathe.storage import Scaled, Scattered, parse_format, take_lines

FORMS = ["bf16:62.5%", "int8:channel,50%", "int4:g32,asym,30%", "int3:g32,50%", "nvfp4:90%", "fp8_e4m3:b4x32,50%"]
N, K = 10, 96


def scattered(form: str) -> Scattered:
    stored = parse_format(form)
    assert isinstance(stored, Scattered) and str(stored) == form
    return stored


def weight_of(n: int = N, k: int = K, seed: int = 0) -> np.ndarray:
    """Float32 [n, k], of rows that differ in size, so that they differ in what is kept; one of them is zero."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n, k)) * np.exp(rng.normal(size=(n, 1)))
    weight[3] = 0
    return weight.astype(np.float32)


def bits_of(stored: Scattered, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.unpackbits(parts[0], axis=1, bitorder="little").astype(bool)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_largest_and_where_they_are(form: str) -> None:
    stored, weight = scattered(form), weight_of()
    parts = stored.encode(weight)
    told = stored.parts(N, K)
    assert list(told)[:3] == ["mask", "start", "codes"] and told["codes"].rows == 0
    assert [(p.shape, p.dtype) for p in parts] == [(t.shape, t.dtype) for t in told.values()]
    bits, sizes = bits_of(stored, parts), np.abs(weight)
    assert bits.sum() == weight.size - round(stored.percent / 100 * weight.size)
    assert sizes[bits].min() > sizes[~bits].max() and len({*bits.sum(1)}) > 3
    dense = stored.dense
    whole = np.asarray(dense.dequantize(*map(jnp.asarray, dense.encode(np.where(bits, weight, 0)))))
    expected = np.where(bits, whole, 0)
    np.testing.assert_array_equal(np.asarray(jax.jit(stored.dequantize)(*map(jnp.asarray, parts))), expected)
    index = jnp.array([[7, 3], [0, 2]])
    lines = take_lines(stored, index, *map(jnp.asarray, parts))
    np.testing.assert_array_equal(stored.decode(*lines), expected[index])


def test_what_is_zero_already_comes_back() -> None:
    """Before: 60 % zeros among numbers that bf16 holds. Expected: these, in 9 bits and an offset a row, not 16."""
    stored = scattered("bf16:50%")
    exact = np.asarray(jnp.asarray(weight_of(), jnp.bfloat16), np.float32)
    exact[np.random.default_rng(1).random(exact.shape) < 0.6] = 0
    np.testing.assert_array_equal(stored.dequantize(*map(jnp.asarray, stored.encode(exact))), exact)
    assert stored.bits(N, K) == 9 + 32 / K
    assert scattered("int4:g32,50%").bits(N, K) == 1 + 2 + 16 / 32 + 32 / K


@pytest.mark.parametrize("form", ["bf16:50%", "int4:g32,asym,30%", "nvfp4:90%"])
def test_a_matrix_of_zeros(form: str) -> None:
    stored, zeros = scattered(form), np.zeros((N, K), np.float32)
    parts = stored.encode(zeros)
    of_equals_the_first = np.arange(N * K) < N * K - round(stored.percent / 100 * N * K)
    np.testing.assert_array_equal(bits_of(stored, parts).ravel(), of_equals_the_first)
    np.testing.assert_array_equal(stored.dequantize(*map(jnp.asarray, parts)), zeros)


@pytest.mark.parametrize("form", ["int3:g32,asym,30%", "nf4:g48,70%"])
def test_levels_that_a_method_chose_are_kept(form: str) -> None:
    stored, weight = scattered(form), weight_of()
    dense = stored.dense
    assert isinstance(dense, Scaled)
    steps = dense.fit(weight)
    scale, zero = dense.spread(steps, weight.shape)
    levels = dense.nearest(weight, scale, zero)
    parts = stored.pack(levels, weight, steps)
    found = stored.dequantize(*map(jnp.asarray, parts))
    np.testing.assert_array_equal(found, np.where(bits_of(stored, parts), dense.values(levels, scale, zero), 0))


def test_products_expand_some_rows_at_a_time() -> None:
    """Before: twice as many weights as are expanded at once, and some. Expected: the product with all of them."""
    k = EXPANDED // 128
    stored, weight = scattered("bf16:50%"), weight_of(300, k)
    parts = tuple(map(jnp.asarray, stored.encode(weight)))
    x = np.random.default_rng(2).normal(size=(2, k)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(stored.dequantize(*parts), np.float64).T
    found = quantized_dot(jnp.asarray(x), *parts, out_dtype="float32", format=str(stored))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gradients_reach_the_kept() -> None:
    stored = scattered("bf16:50%")
    mask, start, codes = map(jnp.asarray, stored.encode(weight_of()))
    slope = jax.grad(lambda codes: stored.dequantize(mask, start, codes).sum())(codes)
    assert (slope == 1).all()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        *((f"bf16:{zeros}%", "expected zeros of 0.0001% or more and less") for zeros in ("0", "0.00001", "100")),
        ("bf16:33.33333333%", "expected at most 6 digits"),
        ("bf16:2of4,50%", "2of4 and 50% exclude each other"),
        ("q8_0:50%", "blocks hold all of their weights"),
        ("bf16:-5%", "bf16 has no options"),
    ],
)
def test_texts_that_are_none(form: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_format(form)


def test_equal_meaning_is_equal_text() -> None:
    assert str(parse_format("bf16:50.0%")) == "bf16:50%"
    assert str(parse_format("bf16:0.0001%")) == "bf16:0.0001%"


@pytest.mark.parametrize(
    ("form", "n", "k", "message"),
    [
        ("bf16:50%", 4, 30, "bf16:50%: a bit a weight fills whole bytes, and 8 does not divide 30"),
        ("bf16:99%", 4, 8, "bf16:99% keeps 0 of 32"),
        ("bf16:1%", 4, 8, "bf16:1% keeps 32 of 32"),
        ("bf16:50%", 1 << 20, 1 << 13, "bf16:50% keeps 4294967296 of 8589934592; expected fewer"),
        ("int4:g64,50%", 4, 96, "group=64 does not divide 96"),
    ],
)
def test_what_does_not_fit(form: str, n: int, k: int, message: str) -> None:
    assert (parse_format(form).misfit(n, k) or "").startswith(message)
    assert parse_format(form).misfit(64, 192) is None


def test_experts_are_stacked() -> None:
    """Before: rows of two experts. Expected: each multiplied with its own weight."""
    stored = scattered("int4:g32,50%")
    each = [tuple(map(jnp.asarray, stored.encode(weight_of(seed=seed)))) for seed in (0, 1)]
    x = np.random.default_rng(2).normal(size=(5, K)).astype(np.float32)
    parts = map(jnp.stack, zip(*each, strict=True))
    found = quantized_ragged_dot(jnp.asarray(x), jnp.array([2, 3]), *parts, out_dtype="float32", format=str(stored))
    first, second = (np.asarray(stored.dequantize(*own), np.float64) for own in each)
    expected = np.concatenate([x[:2] @ first.T, x[2:] @ second.T])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
