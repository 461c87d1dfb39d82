"""Tensor types: what is stored for each, decoded to numbers and encoded from them."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from xlathe.errors import CheckpointError
from xlathe.models.checkpoint import Tensor
from xlathe.models.formats.gguf.container import Container, Entry

Type = GGMLQuantizationType
PLAIN: Final[Mapping[Type, np.dtype[Any]]] = {
    Type.F32: np.dtype("<f4"),
    Type.F16: np.dtype("<f2"),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
    Type.F64: np.dtype("<f8"),
    Type.I8: np.dtype("i1"),
    Type.I16: np.dtype("<i2"),
    Type.I32: np.dtype("<i4"),
    Type.I64: np.dtype("<i8"),
}
CHUNK: Final = 1 << 16  # numbers worked on at a time: their scratch stays in the cache
DECODED: Final = 1 << 20  # numbers decoded at a time: the decoders' scratch is a few times that
LEAST: Final = 1 / np.finfo(np.float32).max  # scales whose inverse is infinite; float16 has them as zero
ROUND: Final = np.nextafter(np.float32(0.5), np.float32(0))
"""Added before truncation, it rounds halves away from zero: 0.5 itself would also lift the number just below a half."""


def as_tensor(container: Container, entry: Entry) -> Tensor:
    """Returns a tensor that is a view of the file for plain types, and decoded to float32 when read otherwise."""
    if entry.type in PLAIN:
        dtype = PLAIN[entry.type]
        return Tensor(entry.shape, dtype, lambda: container.bytes_of(entry).view(dtype).reshape(entry.shape))
    return Tensor(entry.shape, np.dtype(np.float32), lambda: decode(container, entry))


def decode(container: Container, entry: Entry) -> np.ndarray:
    """Returns float32 [*entry.shape] of blocks of codes, by the decoders of the package gguf."""
    block, size = GGML_QUANT_SIZES[entry.type]
    codes = container.bytes_of(entry).reshape(-1, size)
    out = np.empty((len(codes), block), np.float32)
    step = DECODED // block
    try:
        with np.errstate(all="ignore"):  # damaged scales give infinities, which are what the file says
            for i in range(0, len(codes), step):
                out[i : i + step] = quants.dequantize(codes[i : i + step], entry.type)
    except NotImplementedError:
        raise CheckpointError(
            f"{container.path}: tensor {entry.name!r}: expected a type that has a decoder, found {entry.type.name}"
        ) from None
    return out.reshape(entry.shape)


def encode(array: np.ndarray, kind: Type) -> Iterator[np.ndarray]:
    """Yields the bytes of `array` (rows of whole blocks) as F32, F16, BF16 or Q8_0, a chunk at a time.

    Raises FloatingPointError where a number, or a block's scale, does not fit float16.
    """
    flat = array.reshape(-1)
    for i in range(0, flat.size, CHUNK):
        numbers = flat[i : i + CHUNK]
        with np.errstate(over="raise"):
            if kind is Type.Q8_0:
                yield encode_q8_0(numbers.astype(np.float32, copy=False))
            else:
                yield np.ascontiguousarray(numbers.astype(PLAIN[kind], copy=False)).view(np.uint8)


def encode_q8_0(numbers: np.ndarray) -> np.ndarray:
    """Returns uint8 [n / 32 * 34]: a float16 scale, max |block| / 127, and 32 int8 codes a block.

    The arithmetic is that of ggml's quantize_row_q8_0_ref, so that the bytes are the same.
    """
    blocks = numbers.reshape(-1, 32)
    scale = _largest(blocks) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > LEAST)
    scaled = blocks * inverse
    scaled += np.copysign(ROUND, scaled)
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = scale.astype("<f2").view(np.uint8)
    np.copyto(out[:, 2:].view(np.int8), scaled, casting="unsafe")
    return out.reshape(-1)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """Returns max |x| of each row of 32, float32 [n, 1], by halving: NumPy reduces short rows slowly."""
    largest = np.abs(blocks)
    while (half := largest.shape[1] // 2) >= 1:
        largest = np.maximum(largest[:, :half], largest[:, half:])
    return largest
