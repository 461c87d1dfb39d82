"""What the bytes of GGUF's blocks stand for: uint8 [..., bytes of a block] -> float32 [..., numbers of a block].

The layouts are those of `ggml-common.h`, https://github.com/ggml-org/ggml; `xlathe.kernels.gguf_blocks.reference`
writes them. A scale is a float16 times a whole number, and that times a code has at most 24 bits: every product is
exact, and where something is added there is one rounding.
"""

from collections.abc import Callable, Mapping
from typing import Final

import jax
import jax.numpy as jnp

from xlathe.kernels.gguf_blocks.search import TABLE
from xlathe.storage.elements import look_up

Array = jax.Array


def _q4_0(b: Array) -> Array:
    return _half(b, 0) * (_low_high(b[..., 2:]) - 8)


def _q4_1(b: Array) -> Array:
    return _half(b, 0) * _low_high(b[..., 4:]) + _half(b, 2)


def _q5_0(b: Array) -> Array:
    return _half(b, 0) * (_low_high(b[..., 6:]) + 16 * _each_bit(b[..., 2:6]) - 16)


def _q5_1(b: Array) -> Array:
    return _half(b, 0) * (_low_high(b[..., 8:]) + 16 * _each_bit(b[..., 4:8])) + _half(b, 2)


def _q8_0(b: Array) -> Array:
    return _half(b, 0) * _signed(b[..., 2:])


def _iq4_nl(b: Array) -> Array:
    return _half(b, 0) * _table(_low_high(b[..., 2:]))


def _q2_k(b: Array) -> Array:
    scale, low = _parts(_float(b[..., :16] & 15), 16), _parts(_float(b[..., :16] >> 4), 16)
    return _half(b, 80) * scale * _pairs(b[..., 16:80]) - _half(b, 82) * low


def _q3_k(b: Array) -> Array:
    high = _shifted(b[..., :32], range(8))  # a clear bit takes 4 away
    nibbles, pairs = _shifted(b[..., 96:104], (0, 4)), _shifted(b[..., 104:108], (0, 2, 4, 6))
    steps = _float(nibbles & 15) + 16 * _float(pairs & 3) - 32
    return _half(b, 108) * _parts(steps, 16) * (_pairs(b[..., 32:96]) + 4 * _float(high & 1) - 4)


def _q4_k(b: Array) -> Array:
    scale, low = _six_bits(b[..., 4:16])
    return _half(b, 0) * scale * _nibbles(b[..., 16:], 32) - _half(b, 2) * low


def _q5_k(b: Array) -> Array:
    scale, low = _six_bits(b[..., 4:16])
    codes = _nibbles(b[..., 48:], 32) + 16 * _float(_shifted(b[..., 16:48], range(8)) & 1)
    return _half(b, 0) * scale * codes - _half(b, 2) * low


def _q6_k(b: Array) -> Array:
    codes = _nibbles(b[..., :128], 64) + 16 * _pairs(b[..., 128:192]) - 32
    return _half(b, 208) * _parts(_signed(b[..., 192:208]), 16) * codes


def _iq4_xs(b: Array) -> Array:
    low, high = b[..., 4:8], b[..., 2:4]
    nibbles = jnp.stack([low & 15, low >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    pairs = jnp.stack([high >> i & 3 for i in (0, 2, 4, 6)], axis=-1).reshape(*b.shape[:-1], 8)
    codes = _low_high(b[..., 8:].reshape(*b.shape[:-1], 8, 16)).reshape(*b.shape[:-1], 256)
    return _half(b, 0) * _parts(_float(nibbles) + 16 * _float(pairs) - 32, 32) * _table(codes)


def _half(b: Array, at: int) -> Array:
    """Returns a little-endian float16 as float32 [..., 1]."""
    wide = b[..., at : at + 2].astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type(wide[..., 0] | wide[..., 1] << 8, jnp.float16)
    return half.astype(jnp.float32)[..., None]


def _float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


def _signed(b: Array) -> Array:
    return jax.lax.bitcast_convert_type(b, jnp.int8).astype(jnp.float32)


def _parts(of_part: Array, part: int) -> Array:
    """Returns what belongs to each number of what belongs to each part of so many."""
    return jnp.repeat(of_part, part, axis=-1)


def _shifted(b: Array, shifts: tuple[int, ...] | range) -> Array:
    """Returns the bytes shifted by the first, then all by the second, ...: [..., shifts * bytes]."""
    return jnp.concatenate([b >> shift for shift in shifts], axis=-1)


def _low_high(b: Array) -> Array:
    """Low halves of bytes, then high ones."""
    return _float(_shifted(b, (0, 4)) & 15)


def _each_bit(b: Array) -> Array:
    """The bits of bytes in order, lowest first."""
    return _float(jnp.stack([b >> i & 1 for i in range(8)], axis=-1).reshape(*b.shape[:-1], -1))


def _nibbles(b: Array, apart: int) -> Array:
    """Codes that lie `apart` share a byte."""
    grouped = b.reshape(*b.shape[:-1], -1, apart)
    return _low_high(grouped).reshape(*b.shape[:-1], -1)


def _pairs(b: Array) -> Array:
    """Byte l of 32 holds two bits of the codes l, l + 32, l + 64 and l + 96."""
    grouped = _shifted(b.reshape(*b.shape[:-1], -1, 32), (0, 2, 4, 6)) & 3
    return _float(grouped).reshape(*b.shape[:-1], -1)


def _six_bits(b: Array) -> tuple[Array, Array]:
    """Returns eight scales and eight lows, each for 32 numbers, of twelve bytes."""
    first, second, third = b[..., :4], b[..., 4:8], b[..., 8:]
    scales = jnp.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    lows = jnp.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return _parts(_float(scales), 32), _parts(_float(lows), 32)


def _table(codes: Array) -> Array:
    return look_up(TABLE, codes)


VALUES: Final[Mapping[str, Callable[[Array], Array]]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "iq4_nl": _iq4_nl,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs,
}  # fmt: skip
