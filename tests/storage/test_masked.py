"""Weights without their zeros beside NumPy that unpacks them bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.storage import Masked, Scaled, parse_format, take_lines

FORMS = ["bf16:2of4", "f16:1of3", "bf16:48of96", "int8:channel,2of4", "int4:g32,2of4", "int4:g32,asym,4of8"]
FORMS += ["nf4:g48,1of3", "mxfp4:2of4", "nvfp4:4of8", "int8:tensor,2of4", "fp8_e4m3:b4x32,2of4"]
N, K = 10, 96


def masked(form: str) -> Masked:
    stored = parse_format(form)
    assert isinstance(stored, Masked) and str(stored) == form
    return stored


def normal(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, K)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_largest_and_where_they_are(form: str) -> None:
    stored, weight = masked(form), normal()
    parts = stored.encode(weight)
    told = stored.parts(N, K)
    assert next(iter(told)) == "mask"
    assert [(p.shape, p.dtype) for p in parts] == [(t.shape, t.dtype) for t in told.values()]
    bits = np.unpackbits(parts[0], axis=1, bitorder="little")[:, :K].astype(bool)
    groups = bits.reshape(N, -1, stored.of)
    assert (groups.sum(-1) == stored.keep).all()
    sizes = np.abs(weight).reshape(groups.shape)
    assert (np.where(groups, sizes, np.inf).min(-1) > np.where(groups, 0, sizes).max(-1)).all()
    expected = np.zeros((N, K), np.float32)
    expected[bits] = np.asarray(stored.kept.dequantize(*map(jnp.asarray, parts[1:]))).ravel()
    found = np.asarray(jax.jit(stored.dequantize)(*map(jnp.asarray, parts)))
    np.testing.assert_array_equal(found, expected)
    lines = take_lines(stored, jnp.array([7, 2]), *map(jnp.asarray, parts))
    np.testing.assert_array_equal(stored.decode(*lines), expected[[7, 2]])


def test_numbers_that_are_floats_come_back() -> None:
    """Before: at most 2 of 4 weights that bf16 holds are not zero. Expected: these, in 9 bits each instead of 16."""
    stored = masked("bf16:2of4")
    exact = np.asarray(jnp.asarray(normal(), jnp.bfloat16), np.float32).reshape(N, -1, 4)
    exact[..., 1::2] = 0
    exact[3, :5] = 0
    exact = exact.reshape(N, K)
    np.testing.assert_array_equal(stored.dequantize(*map(jnp.asarray, stored.encode(exact))), exact)
    assert stored.bits(N, K) == 9
    assert masked("int4:g32,2of4").bits(N, K) == 1 + 2 + 16 / 32


@pytest.mark.parametrize("form", ["int8:channel,2of4", "int4:g32,2of4", "int4:g32,asym,4of8", "nf4:g48,1of3"])
def test_levels_that_a_method_chose_are_kept(form: str) -> None:
    stored, weight = masked(form), normal()
    dense = stored.dense
    assert isinstance(dense, Scaled)
    steps = dense.fit(weight)
    scale, zero = dense.spread(steps, weight.shape)
    levels = dense.nearest(weight, scale, zero)
    parts = stored.pack(levels, weight, steps)
    bits = np.unpackbits(parts[0], axis=1, bitorder="little")[:, :K].astype(bool)
    found = stored.dequantize(*map(jnp.asarray, parts))
    np.testing.assert_array_equal(found, np.where(bits, dense.values(levels, scale, zero), 0))
    np.testing.assert_array_equal(parts[0], stored.encode(weight)[0])


def test_gradients_reach_the_kept() -> None:
    stored = masked("bf16:2of4")
    mask, codes = map(jnp.asarray, stored.encode(normal()))
    slope = jax.grad(lambda codes: stored.dequantize(mask, codes).sum())(codes)
    assert (slope == 1).all()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("bf16:4of4", "expected fewer than 4 of 4"),
        ("bf16:2of4,1of4", "2of4 and 1of4 exclude each other"),
        ("bf16:2of4,g32", "bf16 has no options"),
        ("q8_0:2of4", "blocks hold all of their weights"),
        ("int4:g32,2of5", "expected a group of 32 to be whole times 5"),
    ],
)
def test_texts_that_are_none(form: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_format(form)


@pytest.mark.parametrize(
    ("form", "k", "message"),
    [
        ("bf16:2of4", 30, "2 of 4: 4 does not divide 30"),
        ("int4:g64,2of4", 96, "group=64 does not divide 96"),
        ("int4:channel,1of4", 12, "2 codes of 4 bits fill whole bytes, which does not divide 3"),
    ],
)
def test_what_does_not_fit(form: str, k: int, message: str) -> None:
    assert (parse_format(form).misfit(4, k) or "").startswith(message)
    assert parse_format(form).misfit(4, 192) is None
