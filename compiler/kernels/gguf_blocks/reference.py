"""GGUF's blocks in NumPy, written from their definition: what the kernel is compared with, and its fall-back.

Arrays are [numbers of a block, blocks], so that one NumPy operation does a step of all blocks. ggml adds numbers up one
after the other in float32, and its bytes depend on the order: so do the sums here. `importance` is the weight of each
squared error, from an importance matrix, or None. Layouts and searches: `ggml-quants.c` of https://github.com/ggml-org/ggml
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from xlathe.kernels.gguf_blocks.layouts import LAYOUTS, LIMIT, NOT_FINITE, TOO_LARGE
from xlathe.kernels.gguf_blocks.search import (
    NOTHING,
    Array,
    affine,
    best_code,
    clipped,
    descended,
    f32,
    inverse_of,
    largest,
    lowest,
    nearest,
    positive,
    symmetric,
    table_scale,
    total,
)

FINE: Final = (-0.9, 0.05, 36)
"""Of the tried inverse scales: first, step, number of steps."""
SUPER: Final = 256


def encode(x: Array, type: str, importance: Array | None = None) -> Array:
    """Returns the blocks of rows.

    x: float [rows, columns], columns a multiple of the block's numbers; type: a name in `LAYOUTS`; importance: float32
    [columns]. Returns uint8 [rows, columns / numbers of a block * bytes of a block]. Raises FloatingPointError for
    numbers that are not finite, or whose scale is larger than float16 holds.
    """
    layout = LAYOUTS[type]
    rows, columns = x.shape
    x = x.astype(np.float32, copy=False)
    blocks = x.reshape(-1, layout.numbers).T
    weights = None
    if importance is not None:
        weights = np.broadcast_to(importance, x.shape).reshape(-1, layout.numbers).T
    with np.errstate(all="ignore"):
        if weights is not None and type in BY_ROW:
            spread = np.repeat(total(np.square(x.T)) / f32(columns), columns // layout.numbers)
            weights = weights * np.sqrt(spread + blocks * blocks)
        codes, halves = ENCODERS[type](blocks, weights)
        large = any(np.isinf(half).any() for half in halves) or (np.abs(x) >= LIMIT).any()
    layout.check((0 if np.isfinite(x).all() else NOT_FINITE) | (TOO_LARGE if large else 0))
    return np.ascontiguousarray(codes.T).reshape(rows, -1)  # a file is written from its buffer


Encoded = tuple[Array, tuple[Array, ...]]
"""Bytes, uint8 [bytes of a block, blocks], and the scales in float16."""


def q4_0(x: Array, weights: Array | None) -> Encoded:
    return _symmetric(x, weights, 4)


def q5_0(x: Array, weights: Array | None) -> Encoded:
    return _symmetric(x, weights, 5)


def _symmetric(x: Array, weights: Array | None, width: int) -> Encoded:
    """x ~ scale * (code - half), where the largest x has the code 0."""
    half = 1 << (width - 1)
    if weights is not None:
        scale, codes = symmetric(x, weights, half)
    else:
        scale = largest(x)[1] / f32(-half)
        codes = np.minimum(_low_byte(x * inverse_of(scale) + f32(half + 0.5)), 2 * half - 1)
    return _stacked(_half_bytes(scale), *_code_bytes(codes, width)), (scale.astype(np.float16),)


def q4_1(x: Array, weights: Array | None) -> Encoded:
    return _affine(x, weights, 4)


def q5_1(x: Array, weights: Array | None) -> Encoded:
    return _affine(x, weights, 5)


def _affine(x: Array, weights: Array | None, width: int) -> Encoded:
    """x ~ scale * code + low."""
    most = (1 << width) - 1
    if weights is not None:
        scale, least, codes = affine(x, weights, most, FINE, sizes=False)
        low = -least
    else:
        low = lowest(x)
        scale = (-lowest(-x) - low) / f32(most)
        codes = np.minimum(_low_byte((x - low) * inverse_of(scale) + f32(0.5)), most)
    halves = (scale.astype(np.float16), low.astype(np.float16))
    return _stacked(_half_bytes(scale), _half_bytes(low), *_code_bytes(codes, width)), halves


def q8_0(x: Array, weights: Array | None) -> Encoded:
    """x ~ scale * code, halves rounded away from zero; importance has no part in it."""
    scale = largest(x)[0] / f32(127)
    scaled = x * inverse_of(scale)
    # 0.5 itself would also lift the number just below a half
    codes = _low_byte(scaled + np.copysign(np.nextafter(f32(0.5), f32(0)), scaled))
    return _stacked(_half_bytes(scale), codes), (scale.astype(np.float16),)


def iq4_nl(x: Array, importance: Array | None) -> Encoded:
    """x ~ scale * table[code]."""
    spread = total(x * x) * f32(2 / 32)
    weights = x * x if importance is None else importance * np.sqrt(spread + x * x)
    scale = table_scale(x, weights)
    codes = best_code(inverse_of(scale) * x)
    return _stacked(_half_bytes(scale), *_code_bytes(codes, 4)), (scale.astype(np.float16),)


def q2_k(x: Array, importance: Array | None) -> Encoded:
    codes, scales, lows, halves = _parts(x, importance, part=16, most=3, top=15, coarse=(-0.5, 0.1, 15))
    return _stacked(scales | lows << 4, _pairs(codes), *map(_half_bytes, halves)), halves


def q4_k(x: Array, importance: Array | None) -> Encoded:
    codes, scales, lows, halves = _parts(x, importance, part=32, most=15, top=63, coarse=(-1.0, 0.1, 20))
    return _stacked(*map(_half_bytes, halves), *_six_bits(scales, lows), _nibbles(codes, 32)), halves


def q5_k(x: Array, importance: Array | None) -> Encoded:
    codes, scales, lows, halves = _parts(x, importance, part=32, most=31, top=63, coarse=(-0.5, 0.1, 15))
    high = _bits(codes >> 4)
    return _stacked(*map(_half_bytes, halves), *_six_bits(scales, lows), high, _nibbles(codes, 32)), halves


def _parts(
    x: Array, importance: Array | None, part: int, most: int, top: int, coarse: tuple[float, float, int]
) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """x ~ scale * code - low, in parts whose scales and lows are codes <= top times a float16 each.

    Returns the codes [256, blocks], those of scales and lows [parts, blocks], and the two float16.
    """
    x = x.reshape(SUPER // part, part, -1).swapaxes(0, 1)  # [part, parts, blocks]
    if importance is not None:
        squares = total(x.swapaxes(0, 1).reshape(SUPER, -1) ** 2)
        spread = squares / f32(SUPER) if part == 16 else f32(2) * squares / f32(SUPER)
        weights = importance.reshape(SUPER // part, part, -1).swapaxes(0, 1) * np.sqrt(spread + x * x)
        scale, low, codes = affine(x, weights, most, FINE, sizes=False)
        sums = total(weights)
        (scale_of_scales, scales), (scale_of_lows, lows) = positive(scale, sums, top), positive(low, sums, top)
    else:
        base = f32(0) if part == 16 else np.sqrt(total(x * x) / f32(part))
        scale, low, codes = affine(x, base + np.abs(x), most, coarse, sizes=part == 16)
        (scale_of_scales, scales), (scale_of_lows, lows) = _steps(scale, top), _steps(low, top)
    halves = scale_of_scales.astype(np.float16), scale_of_lows.astype(np.float16)
    step, offset = (half.astype(np.float32) * code for half, code in zip(halves, (scales, lows), strict=True))
    codes = _again(x, step, offset, 0, most, codes)
    return codes.swapaxes(0, 1).reshape(SUPER, -1), scales, lows, halves


def _steps(numbers: Array, top: int) -> tuple[Array, Array]:
    """Returns a scale, the largest of the numbers / top, and the numbers in multiples of it."""
    high = np.maximum(numbers.max(0), f32(0))
    inverse = np.where(high > 0, f32(top) / high, f32(0))
    return np.where(high > 0, high / f32(top), f32(0)), np.minimum(nearest(inverse * numbers) & 255, top)


def _again(x: Array, scale: Array, offset: Array | np.float32, low: int, high: int, codes: Array) -> Array:
    """Returns codes rounded with the scales as they are stored; where those are zero, the codes of the search."""
    return np.where(scale == 0, codes, clipped(nearest((x + offset) / scale), low, high) - low)


def q3_k(x: Array, importance: Array | None) -> Encoded:
    x = x.reshape(16, 16, -1).swapaxes(0, 1)
    if importance is not None:
        spread = f32(2) * total(x.swapaxes(0, 1).reshape(SUPER, -1) ** 2) / f32(SUPER)
        weights = importance.reshape(16, 16, -1).swapaxes(0, 1) * np.sqrt(spread + x * x)
        scale, codes = symmetric(x, weights, 4)
        whole, steps = symmetric(scale, total(weights), 32)
    else:
        scale, codes = descended(x, 4)
        peak = largest(scale)[1]
        inverse = f32(-32) / peak
        rounded = clipped(nearest(inverse * scale).astype(np.int8).astype(np.int32), -32, 31) + 32
        steps = np.where(peak != 0, rounded, 0)
        whole = np.where(peak != 0, f32(1) / inverse, f32(0))
    half = whole.astype(np.float16)
    step = half.astype(np.float32) * (steps - 32).astype(np.float32)
    codes = _again(x, step, f32(0), -4, 3, codes).swapaxes(0, 1).reshape(SUPER, -1)
    high = steps >> 4
    packed = high[0:4] | high[4:8] << 2 | high[8:12] << 4 | high[12:16] << 6
    nibbles = (steps[:8] & 15) | (steps[8:] & 15) << 4
    return _stacked(_bits(codes >> 2), _pairs(codes & 3), nibbles, packed, _half_bytes(half)), (half,)


def q6_k(x: Array, importance: Array | None) -> Encoded:
    x = x.reshape(16, 16, -1).swapaxes(0, 1)
    weights = x * x if importance is None else importance.reshape(16, 16, -1).swapaxes(0, 1)
    scale, codes = symmetric(x, weights, 32)
    size, peak = largest(scale)
    inverse = f32(-128) / peak
    some = ~(size < NOTHING)
    half = np.where(some, f32(1) / inverse, f32(0)).astype(np.float16)
    steps = np.minimum(nearest(inverse * scale), 127).astype(np.int8).astype(np.int32) * some
    codes = _again(x, half.astype(np.float32) * steps.astype(np.float32), f32(0), -32, 31, codes) * some
    codes = codes.swapaxes(0, 1).reshape(SUPER, -1)
    return _stacked(_nibbles(codes, 64), _pairs(codes >> 4), steps, _half_bytes(half)), (half,)


def iq4_xs(x: Array, importance: Array | None) -> Encoded:
    spread = total(x * x) * f32(2 / SUPER)
    weights = x * x if importance is None else importance * np.sqrt(spread + x * x)
    x, weights = (a.reshape(8, 32, -1).swapaxes(0, 1) for a in (x, weights))
    scale = table_scale(x, weights)
    whole = -largest(scale)[1] / f32(32)
    steps = clipped(nearest(inverse_of(whole) * scale), -32, 31)
    codes = best_code(inverse_of(whole * steps.astype(np.float32)) * x)
    packed = [byte for part in range(8) for byte in _code_bytes(codes[:, part], 4)]
    stored = steps + 32
    high = np.bitwise_or.reduce((stored >> 4) << (2 * np.arange(8)[:, None]))
    low = (stored[0::2] & 15) | (stored[1::2] & 15) << 4
    return _stacked(_half_bytes(whole), np.stack([high & 255, high >> 8]), low, *packed), (whole.astype(np.float16),)


def _low_byte(numbers: Array) -> Array:
    """Returns the truncated numbers as int8, and 0 for what is no int32."""
    fits = np.abs(numbers) < 2.0**31
    return np.where(fits, numbers, f32(0)).astype(np.int32).astype(np.int8).astype(np.int32)


def _stacked(*rows: Array) -> Array:
    return np.concatenate([np.atleast_2d(row) & 255 for row in rows]).astype(np.uint8)


def _half_bytes(numbers: Array) -> Array:
    return np.ascontiguousarray(numbers.astype("<f2")).view(np.uint8).reshape(-1, 2).T.astype(np.int32)


def _code_bytes(codes: Array, width: int) -> tuple[Array, ...]:
    """Codes j and j + 16 share a byte; of five bits the highest lies in 4 bytes of their own, before the others."""
    nibbles = (codes[:16] & 15) | (codes[16:] & 15) << 4
    if width == 4:
        return (nibbles,)
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=0, bitorder="little").astype(np.int32), nibbles


def _pairs(codes: Array) -> Array:
    """Byte l of 32 holds two bits of the codes l, l + 32, l + 64 and l + 96 of each 128."""
    q = (codes & 3).reshape(2, 4, 32, -1)
    return (q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6).reshape(64, -1)


def _nibbles(codes: Array, apart: int) -> Array:
    """Codes that lie `apart` share a byte."""
    q = (codes & 15).reshape(-1, 2, apart, codes.shape[-1])
    return (q[:, 0] | q[:, 1] << 4).reshape(128, -1)


def _bits(codes: Array) -> Array:
    """Bit k of byte l is that of the code l + 32 k."""
    q = (codes & 1).reshape(8, 32, -1) << np.arange(8)[:, None, None]
    return np.bitwise_or.reduce(q)


def _six_bits(scales: Array, lows: Array) -> tuple[Array, ...]:
    """Twelve bytes of eight scales and eight lows: the first four of each in six bits, the rest where there is room."""
    first = [part[:4] | (part[4:] >> 4) << 6 for part in (scales, lows)]
    return (*first, (scales[4:] & 15) | (lows[4:] & 15) << 4)


ENCODERS: Final[Mapping[str, Callable[[Array, Array | None], Encoded]]] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "IQ4_NL": iq4_nl,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs,
}  # fmt: skip
BY_ROW: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types that weigh importance by the mean square of a row."""
