"""Levels of every element, at all code points, beside ml_dtypes and NumPy written out from the specifications."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from xlathe.storage.elements import FLOATS, INTEGERS, Integer, Minifloat, find_element, pack_bits, unpack_bits

SMALL = {name: element for name, element in FLOATS.items() if isinstance(element, Minifloat)}


def by_fields(code: int, bits: int, mantissa: int, bias: int) -> float:
    """A small float by its definition: sign, exponent, mantissa; the exponent 0 is that of 1 without the leading 1."""
    sign, rest = code >> (bits - 1), code & (2 ** (bits - 1) - 1)
    exponent, fraction = rest >> mantissa, (rest & (2**mantissa - 1)) / 2**mantissa
    value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
    return -value if sign else value


@pytest.mark.parametrize(("name", "bias"), [("fp8_e4m3", 7), ("fp8_e5m2", 15), ("fp4_e2m1", 1)])
def test_all_code_points_of_small_floats(name: str, bias: int) -> None:
    element = SMALL[name]
    values = np.array([by_fields(code, element.bits, element.mantissa, bias) for code in range(2**element.bits)])
    finite = np.abs(values) <= element.largest
    codes = np.arange(2**element.bits, dtype=np.uint8)
    stored = codes[None].view(ml_dtypes.float8_e4m3fn if name == "fp8_e4m3" else ml_dtypes.float8_e5m2)
    packed = pack_bits(codes[None], 4) if element.bits == 4 else stored
    found = np.asarray(element.unpack(jnp.asarray(packed)))[0]
    np.testing.assert_array_equal(found[finite], values[finite])
    assert element.largest == values[finite].max() and finite.sum() == {"fp8_e4m3": 254, "fp8_e5m2": 248}.get(name, 16)
    np.testing.assert_array_equal(element.nearest(values[finite].astype(np.float32)), values[finite])
    again = element.pack(found[None, finite])
    assert again.tobytes() == (pack_bits(codes[None], 4) if element.bits == 4 else codes[finite]).tobytes()


@pytest.mark.parametrize("name", SMALL)
def test_rounding_is_that_of_a_cast_but_for_what_is_too_large(name: str) -> None:
    """Expected: ml_dtypes' own rounding, ties to even; the largest number where a cast gives NaN or infinity."""
    element = SMALL[name]
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(20000) * 2.0 ** rng.integers(-20, 18, 20000)
    levels = np.array(sorted({by_fields(c, 8, 3, 7) for c in range(126)}))
    ties = np.concatenate([(levels[1:] + levels[:-1]) / 2, levels]) * element.largest / 448
    x = np.concatenate([wide, ties, -ties, [448, 460, 464, 464.1, 500, 1e9, -1e30, 0, -0.0, 1e-38]]).astype(np.float32)
    dtype = getattr(ml_dtypes, element.dtype)
    expected = np.clip(x, -element.largest, element.largest).astype(dtype).astype(np.float32)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(element.nearest(x), expected)
    np.testing.assert_array_equal(jax.jit(element.nearest)(x), expected)


def test_levels_of_nf4() -> None:
    """Expected: 16 quantiles of a normal distribution, normalized to 1: 8 of the negative half, 9 of the other.

    The paper's construction, with the offset of its published code, 0.9677083; the table there is rounded.
    """
    from statistics import NormalDist

    element, offset = FLOATS["nf4"], 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    found = np.asarray(element.unpack(jnp.asarray(pack_bits(np.arange(16, dtype=np.uint8)[None], 4))))[0]
    np.testing.assert_allclose(found, expected, atol=3e-5)
    assert found[0] == -1 and found[7] == 0 and found[15] == 1
    x = np.linspace(-1.2, 1.2, 4001, dtype=np.float32)
    nearest = found[np.abs(x[:, None] - found).argmin(axis=1)]
    np.testing.assert_array_equal(element.nearest(x), nearest)
    np.testing.assert_array_equal(jax.jit(element.nearest)(x), nearest)
    np.testing.assert_array_equal(element.unpack(jnp.asarray(element.pack(found[None])))[0], found)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", INTEGERS)
def test_all_code_points_of_integers(name: str, signed: bool) -> None:
    element = find_element(name, signed=signed)
    assert isinstance(element, Integer)
    bits = INTEGERS[name]
    least = 0 if not signed else -127 if bits == 8 else -(2 ** (bits - 1))
    levels = np.arange(least, least + 2**bits - (signed and bits == 8), dtype=np.float32)
    assert levels[-1] == element.largest
    row = np.resize(levels, 8 * len(levels))[None]
    packed = element.pack(row)
    assert packed.nbytes * 8 == row.size * bits
    np.testing.assert_array_equal(element.unpack(jnp.asarray(packed)), row)
    x = np.linspace(least - 3, levels[-1] + 3, 997, dtype=np.float32)
    np.testing.assert_array_equal(element.nearest(x), np.clip(np.rint(x.astype(np.float64)), least, levels[-1]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_one_stream_of_bits_lowest_first(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 48), dtype=np.uint8)
    streams = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    packed = pack_bits(codes, bits)
    assert [row.tobytes() for row in packed] == [s.to_bytes(48 * bits // 8, "little") for s in streams]
    np.testing.assert_array_equal(unpack_bits(jnp.asarray(packed), bits), codes)
