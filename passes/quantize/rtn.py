"""Round to nearest: the plainest quantizer, and the one every other is measured against."""

import dataclasses
from typing import final

import jax.numpy as jnp
import numpy as np

INT8_MAX = 127  # symmetric: -128 is not used, so that a code and its negative both exist
INT4_LAST = 15  # 4-bit codes are 0 to 15, and stand for code - zero
MIDDLE = 8  # the zero point of symmetric 4-bit codes


@final
@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """Recipe of `codes` int8 [n, k] and `scale` float32 [n] from a weight; w ~ codes * scale.

    free, contracted: axes of the weight that become n and k, in this order.
    """

    free: tuple[int, ...]
    contracted: tuple[int, ...]

    def __call__(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return quantize_channels(_as_matrix(weight, self.free, self.contracted))


@final
@dataclasses.dataclass(frozen=True)
class RoundGroups:
    """Recipe of `codes` uint8 [n, k / 2], `scale` bfloat16 [n, k / group] and, unless it is symmetric, `zero` uint8
    [n, k / group] from a weight; w ~ (code - zero) * scale.

    free, contracted: axes of the weight that become n and k, in this order.
    """

    free: tuple[int, ...]
    contracted: tuple[int, ...]
    group: int
    symmetric: bool

    def __call__(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        codes, scale, zero = quantize_groups(
            _as_matrix(weight, self.free, self.contracted), self.group, symmetric=self.symmetric
        )
        return (pack(codes), scale) if self.symmetric else (pack(codes), scale, zero)


def _as_matrix(weight: np.ndarray, free: tuple[int, ...], contracted: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(weight, np.float32)
    sizes = [int(np.prod([array.shape[i] for i in axes])) for axes in (free, contracted)]
    return array.transpose(*free, *contracted).reshape(sizes)


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes float32 [n, k] to int8 codes [n, k] and one float32 scale a row (absmax / 127)."""
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, largest / INT8_MAX, 1.0).astype(np.float32)
    codes = np.rint(weight / scale[:, None])
    return np.clip(codes, -INT8_MAX, INT8_MAX).astype(np.int8), scale


def quantize_groups(weight: np.ndarray, group: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes float32 [n, k] to 4 bits; `group` columns share a scale and a zero point.

    Symmetric, the value of largest magnitude is 8 steps below zero (its scale may be negative), as in ggml's Q4_0,
    so that all 16 codes are used. Otherwise the codes span the values and zero. Codes are chosen after the scale was
    rounded to bfloat16, so that rounding it costs no more than a slightly longer step. A group of zeros has the scale
    0, and products with it are exactly 0.

    Returns codes uint8 [n, k] from 0 to 15, scale bfloat16 [n, k / group], and zero uint8 [n, k / group].
    """
    values = weight.reshape(weight.shape[0], -1, group)
    low, high = np.minimum(values.min(axis=-1), 0), np.maximum(values.max(axis=-1), 0)
    step = np.where(-low >= high, low, high) / -MIDDLE if symmetric else (high - low) / INT4_LAST
    scale = step.astype(jnp.bfloat16)
    exact = np.where(scale == 0, 1, scale.astype(np.float32))
    zero = np.full_like(exact, MIDDLE) if symmetric else np.clip(np.rint(-low / exact), 0, INT4_LAST)
    codes = np.clip(np.rint(values / exact[..., None]) + zero[..., None], 0, INT4_LAST)
    return codes.astype(np.uint8).reshape(weight.shape), scale, zero.astype(np.uint8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs codes uint8 [n, k] below 16 into [n, k / 2]: 2 i in the low and 2 i + 1 in the high half of byte i."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
