"""Whole numbers as layouts see them: codes from 0 up, what of them stands for zero, and scales by group."""

from collections.abc import Callable
from typing import Any

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.layouts.bits import unpack
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import Scaled, parse_format
from xlathe.storage.elements import INTEGERS

SCALES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype("bfloat16"): "bf16"}
"""Types that scales have in files, and how storage formats call them."""
NAMES = {bits: name for name, bits in INTEGERS.items()}


def stored_of(packed: Packed) -> Scaled:
    """Returns a storage format that is of levels and scales."""
    stored = parse_format(packed.format)
    assert isinstance(stored, Scaled)
    return stored


def middle(stored: Scaled) -> int:
    """Returns the code that stands for zero where there are no zero points."""
    return int(2 ** (INTEGERS[stored.element] - 1))


def to_stream(codes: np.ndarray) -> np.ndarray:
    """Returns codes from 0 up, packed into bytes [n, k * bits / 8], of those of our parts."""
    return codes.view(np.uint8) ^ np.uint8(128) if codes.dtype == np.int8 else codes


def from_stream(stored: Scaled, stream: np.ndarray) -> np.ndarray:
    """Undoes `to_stream`."""
    signed = stored.element == "int8" and not stored.zero
    return (stream ^ np.uint8(128)).view(np.int8) if signed else stream


def unpack_levels(stored: Scaled, codes: np.ndarray, k: int) -> np.ndarray:
    """Returns codes from 0 up, uint8 [n, k], of those of our parts."""
    stream = to_stream(codes)
    return stream if stream.shape[1] == k else unpack(stream, INTEGERS[stored.element], k)


def by_group(stored: Scaled, shared: np.ndarray) -> np.ndarray:
    """Returns what groups share as [n, groups]: a channel without groups is one."""
    return shared if stored.columns else shared.reshape(-1, 1)


def zeros_of(stored: Scaled, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Returns the codes that stand for zero, uint8 like `by_group`, of zero points or of none."""
    shape = scale.shape if stored.columns else (*scale.shape, 1)
    if zero is None:
        return Tensor(shape, np.dtype(np.uint8), lambda: np.full(shape, middle(stored), np.uint8))
    return derived(shape, np.uint8, lambda array: by_group(stored, array), zero)


def exactly(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns an array in another type; raises CheckpointError where a number would change."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    changed = cast.astype(np.float32) != array.astype(np.float32)
    if changed.any():
        raise CheckpointError(
            f"{name}: expected numbers that {np.dtype(dtype)} holds exactly, found {float(array[changed][0])}; a "
            "scheme with s=f16 has such scales"
        )
    return cast


def derived(shape: tuple[int, ...], dtype: Any, make: Callable[..., np.ndarray], *sources: Tensor) -> Tensor:
    """Returns a tensor that is made of others when it is read."""
    return Tensor(shape, np.dtype(dtype), lambda: make(*(source.read() for source in sources)))
