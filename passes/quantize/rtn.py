"""Round to nearest: the plainest quantizer, and the one every other is measured against."""

import dataclasses
from typing import final

import numpy as np

INT8_MAX = 127  # symmetric: -128 is not used, so that a code and its negative both exist


@final
@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """Recipe of `codes` int8 [n, k] and `scale` float32 [n] from a weight; w ~ codes * scale.

    free, contracted: axes of the weight that become n and k, in this order.
    """

    free: tuple[int, ...]
    contracted: tuple[int, ...]

    def __call__(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array = np.asarray(weight, np.float32)
        sizes = [int(np.prod([array.shape[i] for i in axes])) for axes in (self.free, self.contracted)]
        return quantize_channels(array.transpose(*self.free, *self.contracted).reshape(sizes))


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes float32 [n, k] to int8 codes [n, k] and one float32 scale a row (absmax / 127)."""
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, largest / INT8_MAX, 1.0).astype(np.float32)
    codes = np.rint(weight / scale[:, None])
    return np.clip(codes, -INT8_MAX, INT8_MAX).astype(np.int8), scale
