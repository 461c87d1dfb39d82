"""The numbers that one code can stand for: integers, small floats, and tables.

A *level* is such a number before it is scaled, held in float32. `nearest` works on NumPy and on JAX arrays and is made
of exact steps: casts to a small type and back would not do, for XLA may take them out of a compiled program.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BIAS = 127
"""Of the exponent of float32, and of e8m0."""


def namespace(array: Any) -> Any:
    """Returns `jax.numpy` for a JAX array, and `numpy` for others."""
    return jnp if isinstance(array, jax.Array) else np


class Element(abc.ABC):
    """A set of levels.

    bits: of a stored code. largest: the greatest level. unit: codes that fill whole bytes.
    """

    bits: int
    largest: float

    @property
    def unit(self) -> int:
        return math.lcm(self.bits, 8) // self.bits

    @abc.abstractmethod
    def nearest(self, x: Any) -> Any:
        """Returns the level nearest to each float32 of x; those beyond the last level become the last one."""

    @abc.abstractmethod
    def pack(self, levels: np.ndarray) -> np.ndarray:
        """Returns the codes of levels [n, k]: [n, k], or bytes [n, k * bits / 8] where several share one."""

    @abc.abstractmethod
    def levels_of(self, codes: jax.Array) -> jax.Array:
        """Returns the level of each code as float32, of uint8 below 2**bits, or of 8 bits as they are stored; floats of
        8 bits may be uint8."""

    @final
    def unpack(self, codes: jax.Array) -> jax.Array:
        """Returns the levels float32 [..., k] of packed codes; those of 8-bit floats may be uint8."""
        return self.levels_of(codes if self.bits == 8 else unpack_bits(codes, self.bits))

    @final
    def unpack_at(self, codes: jax.Array, place: jax.Array) -> jax.Array:
        """Returns the levels at some places, int32, among the codes of one row, packed or of 8 bits, [bytes]; out of
        range, the last byte's."""
        if self.bits == 8:
            return self.levels_of(jnp.take(codes, place, mode="clip"))
        unit = math.lcm(self.bits, 8)
        first = place // (unit // self.bits) * (unit // 8)  # bytes before whole codes
        begin = place % (unit // self.bits) * self.bits
        low, high = (jnp.take(codes, first + begin // 8 + i, mode="clip").astype(jnp.uint32) for i in (0, 1))
        words = low if 8 % self.bits == 0 else low | high << 8
        return self.levels_of(words >> (begin % 8).astype(jnp.uint32) & (2**self.bits - 1))


@final
@dataclasses.dataclass(frozen=True)
class Integer(Element):
    """Whole numbers: from -2**(bits - 1), or of 8 bits from -127, so that a code and its negative both exist; or, not
    signed, from 0. Codes of less than 8 bits are stored from 0 up, int8 as it is."""

    bits: int
    signed: bool

    @property
    def least(self) -> int:
        return (-(2 ** (self.bits - 1)) + (self.bits == 8)) * self.signed

    @property
    def largest(self) -> float:  # type: ignore[override]
        return 2 ** (self.bits - self.signed) - 1

    def nearest(self, x: Any) -> Any:
        xp = namespace(x)
        return xp.clip(xp.rint(x), self.least, self.largest)

    def pack(self, levels: np.ndarray) -> np.ndarray:
        if self.bits == 8:
            return levels.astype(np.int8 if self.signed else np.uint8)
        return pack_bits((levels - self.least).astype(np.uint8), self.bits)

    def levels_of(self, codes: jax.Array) -> jax.Array:
        whole = codes.astype(jnp.float32)
        return whole + self.least if self.signed and self.bits < 8 else whole


@final
@dataclasses.dataclass(frozen=True)
class Minifloat(Element):
    """Floats of few bits, rounded to nearest, ties to even. What is no finite number is NaN.

    dtype: as ml_dtypes knows it. mantissa: its explicit bits. smallest: the exponent of the least normal number.
    """

    dtype: str
    bits: int
    mantissa: int
    smallest: int
    largest: float

    def nearest(self, x: Any) -> Any:
        return round_to_float(x, self.mantissa, self.smallest, self.largest)

    def pack(self, levels: np.ndarray) -> np.ndarray:
        codes = levels.astype(getattr(ml_dtypes, self.dtype))
        return codes if self.bits == 8 else pack_bits(codes.view(np.uint8), self.bits)

    def levels_of(self, codes: jax.Array) -> jax.Array:
        """By the same bits of a float16, which has 5 of exponent, times a power of two."""
        wide = (jax.lax.bitcast_convert_type(codes, jnp.uint8) if self.bits == 8 else codes).astype(jnp.uint16)
        sign = 1 << (self.bits - 1)
        half = (wide & (sign - 1)) << (10 - self.mantissa) | (wide & sign) << (16 - self.bits)
        values = jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2.0 ** (self.smallest + 14)
        return jnp.where(jnp.abs(values) > self.largest, jnp.nan, values)


@final
@dataclasses.dataclass(frozen=True)
class Table(Element):
    """16 levels in ascending order, by code."""

    levels: tuple[float, ...]
    bits: int = 4

    @property
    def largest(self) -> float:  # type: ignore[override]
        return self.levels[-1]

    def nearest(self, x: Any) -> Any:
        xp = namespace(x)
        table = xp.asarray(np.array(self.levels, np.float32))
        return table[xp.searchsorted((table[1:] + table[:-1]) / 2, x)]

    def pack(self, levels: np.ndarray) -> np.ndarray:
        return pack_bits(np.searchsorted(np.array(self.levels, np.float32), levels).astype(np.uint8), self.bits)

    def levels_of(self, codes: jax.Array) -> jax.Array:
        return look_up(np.array(self.levels, np.float32), codes)


def round_to_float(x: Any, mantissa: int, smallest: int, largest: float) -> Any:
    """Rounds floats to so many explicit bits of mantissa; below 2**smallest steps stay as they are there."""
    xp = namespace(x)
    step = power_of_two(xp.maximum(exponent_of(x), smallest) - mantissa)
    return xp.clip(xp.rint(x / step) * step, -largest, largest)


def exponent_of(x: Any) -> Any:
    """Returns floor(log2(|x|)) of floats as float32 has them, int32; -127 of 0 and of numbers below 2**-126."""
    if isinstance(x, jax.Array):
        bits: Any = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    else:
        bits = np.asarray(x, np.float32).view(np.int32)
    return (bits >> 23 & 255) - BIAS


def power_of_two(exponent: Any) -> Any:
    """Returns 2**exponent as float32, of int32 from -126 to 127."""
    bits = (exponent + BIAS) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32) if isinstance(bits, jax.Array) else bits.view(np.float32)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 [n, k] below 2**bits into bytes [n, k * bits / 8], little-endian: the first code lies lowest."""
    whole = math.lcm(bits, 8)
    grouped = codes.reshape(len(codes), -1, whole // bits).astype(np.uint32)
    words = (grouped << np.arange(0, whole, bits, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    parts = words[..., None] >> np.arange(0, whole, 8, dtype=np.uint32)
    return (parts & 255).astype(np.uint8).reshape(len(codes), -1)


def unpack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Undoes `pack_bits`: whole numbers [..., k] of bytes [..., k * bits / 8]."""
    whole = math.lcm(bits, 8)
    words = codes
    if whole > 8:
        grouped = codes.reshape(*codes.shape[:-1], -1, whole // 8).astype(jnp.uint32)
        words = sum(grouped[..., i] << (8 * i) for i in range(whole // 8))  # type: ignore[assignment]
    parts = jnp.stack([(words >> i) & (2**bits - 1) for i in range(0, whole, bits)], axis=-1)
    return parts.reshape(*codes.shape[:-1], codes.shape[-1] * 8 // bits)


def look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Picks a number by its code, in selects: a program holds no arrays of its own."""
    found = jnp.full(codes.shape, float(table[0]), jnp.float32)
    for code, value in enumerate(table[1:].tolist(), 1):
        found = jnp.where(codes == code, jnp.float32(value), found)
    return found


FP8_E4M3 = Minifloat("float8_e4m3fn", 8, 3, -6, 448.0)
FP8_E5M2 = Minifloat("float8_e5m2", 8, 2, -14, 57344.0)
FP4_E2M1 = Minifloat("float4_e2m1fn", 4, 1, 0, 6.0)
_NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
NF4 = Table(tuple(map(float, _NF4.split())))
"""Quantiles of a normal distribution, from QLoRA (Dettmers et al., 2023), appendix E."""

INTEGERS: Mapping[str, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits by name."""
FLOATS: Mapping[str, Element] = {"fp8_e4m3": FP8_E4M3, "fp8_e5m2": FP8_E5M2, "fp4_e2m1": FP4_E2M1, "nf4": NF4}


def find_element(name: str, *, signed: bool) -> Element:
    """Returns the element of that name, which must be known; integers may be unsigned."""
    return Integer(INTEGERS[name], signed) if name in INTEGERS else FLOATS[name]
