"""Searches for the scale at which the weighted squared error of rounded numbers is least, of many blocks at once.

Numbers are float32 [n, ...], and what is found of them [...]. Sums run over the first axis in order; operands are
rounded from left to right: a * b * c after a * b.
"""

import functools
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]
f32: Final = np.float32
NOTHING: Final = f32(1e-15)
"""Blocks of smaller numbers are all zero."""
TABLE: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
MIDDLES: Final = (TABLE[1:] + TABLE[:-1]) / f32(2)


def total(terms: Array) -> Array:
    """Returns 0 + terms[0] + terms[1] + ..., in this order."""
    return functools.reduce(np.add, terms, np.zeros(terms.shape[1:], np.float32))


def nearest(numbers: Array) -> Array:
    """Returns the nearest int32, halves to even, of |x| < 2**22; of others what ggml's trick with mantissas gives."""
    return ((numbers.astype(np.float32) + f32(12582912)).view(np.int32) & 0x007FFFFF) - 0x00400000


def clipped(codes: Array, low: int, high: int) -> Array:
    return np.minimum(np.maximum(codes, low), high)


def inverse_of(scale: Array) -> Array:
    return np.where(scale != 0, f32(1) / scale, f32(0))


def largest(x: Array) -> tuple[Array, Array]:
    """Returns the largest |x|, and the first x of that size."""
    size = np.abs(x)
    at = size.argmax(0)
    return size.max(0), np.where(size.max(0) > 0, np.take_along_axis(x, at[None], 0)[0], f32(0))


def lowest(x: Array) -> Array:
    """Returns the first of the smallest numbers: of 0 and -0 the one that comes first."""
    return functools.reduce(lambda low, number: np.where(number < low, number, low), x)


def symmetric(x: Array, weights: Array, most: int) -> tuple[Array, Array]:
    """Returns scale and codes of x ~ scale * (code - most), 0 <= code < 2 * most; all 0 where x is nothing."""
    size, peak = largest(x)

    def products(inverse: Array) -> tuple[Array, Array]:
        codes = clipped(nearest(inverse * x), -most, most - 1).astype(np.float32)
        return total(weights * x * codes), total(weights * codes * codes)

    inverse = f32(-most) / peak
    xl, l2 = products(inverse)
    scale = np.where(l2 != 0, xl / l2, f32(0))
    best = scale * xl
    for step in (s for s in range(-9, 10) if s):
        tried = -(f32(most) + f32(0.1) * f32(step)) / peak
        xl, l2 = products(tried)
        better = (l2 > 0) & (xl * xl > best * l2)
        scale = np.where(better, xl / l2, scale)
        best = np.where(better, scale * xl, best)
        inverse = np.where(better, tried, inverse)
    some = ~(size < NOTHING)
    codes = clipped(nearest(inverse * x), -most, most - 1) + most
    return np.where(some, scale, f32(0)), codes * some


def descended(x: Array, most: int) -> tuple[Array, Array]:
    """Returns the same by coordinate descent: one code after the other takes its best value. Weights are x * x."""
    size, peak = largest(x)
    weights = x * x
    codes = clipped(nearest(f32(-most) / peak * x), -most, most - 1)
    xl = total(weights * x * codes.astype(np.float32))
    l2 = total(weights * codes.astype(np.float32) * codes.astype(np.float32))
    for _ in range(5):
        xl, l2 = _sweep(x, weights, codes, xl, l2, -most, most - 1)
    some = ~(size < NOTHING)
    return np.where(some & (l2 > 0), xl / l2, f32(0)), (codes + most) * some


def _sweep(x: Array, weights: Array, codes: Array, xl: Array, l2: Array, low: int, high: int) -> tuple[Array, Array]:
    """Improves one code after the other, in place; returns the sums of weight * x * code and weight * code^2."""
    for j in range(len(x)):
        old = codes[j].astype(np.float32)
        less_xl, less_l2 = xl - weights[j] * x[j] * old, l2 - weights[j] * old * old
        new = clipped(nearest(x[j] * less_l2 / less_xl), low, high)
        code = new.astype(np.float32)
        new_xl, new_l2 = less_xl + weights[j] * x[j] * code, less_l2 + weights[j] * code * code
        open_ = (less_xl > 0) & (new != codes[j]) & ((less_l2 if low == 0 else new_l2) > 0)
        better = open_ & (new_xl * new_xl * l2 > xl * xl * new_l2)
        codes[j] = np.where(better, new, codes[j])
        xl, l2 = np.where(better, new_xl, xl), np.where(better, new_l2, l2)
    return xl, l2


def affine(
    x: Array, weights: Array, most: int, tries: tuple[float, float, int], *, sizes: bool
) -> tuple[Array, Array, Array]:
    """Returns scale, least >= 0 and codes of x ~ scale * code - least, 0 <= code <= most.

    tries: inverse scales (first + step * i + most) / range for 0 <= i <= steps. For each, scale and minimum are solved
    for given its codes. sizes: the error is |difference| instead of its square.
    """
    low, high = np.where(lowest(x) > 0, f32(0), lowest(x)), x.max(0)
    sum_w, sum_x = functools.reduce(np.add, weights), functools.reduce(np.add, weights * x)
    flat, first_low = high == low, low

    def error(scale: Array, low: Array, level: Array) -> Array:
        off = scale * level + low - x
        return total(weights * (np.abs(off) if sizes else off * off))

    inverse, begin = f32(most) / (high - low), low
    scale = f32(1) / inverse
    least_error = error(scale, low, clipped(nearest(inverse * (x - low)), 0, most).astype(np.float32))
    for i in range(tries[2] + 1):
        tried = (f32(tries[0]) + f32(tries[1]) * f32(i) + f32(most)) / (high - low)
        level = clipped(nearest(tried * (x - low)), 0, most).astype(np.float32)
        sum_l, sum_l2, sum_xl = total(weights * level), total(weights * level * level), total(weights * level * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        next_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = next_low > 0
        next_scale = np.where(above, sum_xl / sum_l2, (sum_w * sum_xl - sum_x * sum_l) / determinant)
        next_low = np.where(above, f32(0), next_low)
        found = error(next_scale, next_low, level)
        better = (determinant > 0) & (found < least_error)
        least_error, inverse = np.where(better, found, least_error), np.where(better, tried, inverse)
        begin, scale = np.where(better, low, begin), np.where(better, next_scale, scale)
        low = np.where(better, next_low, low)
    codes = clipped(nearest(inverse * (x - begin)), 0, most) * ~flat
    return np.where(flat, f32(0), scale), -np.where(flat, first_low, low), codes


def positive(x: Array, weights: Array, most: int) -> tuple[Array, Array]:
    """Returns scale and codes of x ~ scale * code for x >= 0, 0 <= code <= most: a scan, then coordinate descent."""
    high = np.maximum(x.max(0), f32(0))

    def error(inverse: Array, codes: Array) -> Array:
        off = x - f32(1) / inverse * codes.astype(np.float32)
        return total(weights * off * off)

    inverse = f32(most) / high
    least_error = error(inverse, nearest(inverse * x) & 255)
    for step in (s for s in range(-4, 5) if s):
        tried = (f32(0.1) * f32(step) + f32(most)) / high
        found = error(tried, np.minimum(nearest(tried * x), most))
        better = found < least_error
        least_error, inverse = np.where(better, found, least_error), np.where(better, tried, inverse)
    codes = np.minimum(nearest(inverse * x), most)
    xl = total(weights * x * codes.astype(np.float32))
    l2 = total(weights * codes.astype(np.float32) * codes.astype(np.float32))
    for _ in range(5):
        xl, l2 = _sweep(x, weights, codes, xl, l2, 0, most)
    some = ~(high < NOTHING)
    return np.where(some & (l2 > 0), xl / l2, f32(0)), codes * some


def best_code(numbers: Array) -> Array:
    """Returns the codes of the nearest numbers of the table, int32; those in the middle take the upper one."""
    return np.searchsorted(MIDDLES, numbers, side="right").astype(np.int32)


def table_scale(x: Array, weights: Array) -> Array:
    """Returns the scale of x ~ scale * table[code]."""
    size, peak = largest(x)

    def products(inverse: Array) -> tuple[Array, Array]:
        value = TABLE[best_code(inverse * x)]
        return total(weights * value * x), total(weights * value * value)

    xl, l2 = products(f32(1) / (-peak / TABLE[0]))
    scale = np.where(l2 > 0, xl / l2, f32(0))
    best = scale * xl
    for step in range(-7, 8):
        xl, l2 = products((f32(step) + TABLE[0]) / peak)
        better = (l2 > 0) & (xl * xl > best * l2)
        scale = np.where(better, xl / l2, scale)
        best = np.where(better, scale * xl, best)
    return np.where(size < NOTHING, f32(0), scale)
