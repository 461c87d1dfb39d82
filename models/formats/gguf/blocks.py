"""Tensor types: what is stored for each, decoded to numbers and encoded from them."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from xlathe.errors import CheckpointError
from xlathe.kernels.gguf_blocks.encode import encode_rows
from xlathe.kernels.gguf_blocks.layouts import LAYOUTS
from xlathe.models.checkpoint import Tensor
from xlathe.models.formats.gguf.container import Container, Entry
from xlathe.safetensors_file import Packed

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
CHUNK: Final = 1 << 20  # numbers encoded at a time: every core gets some, and they stay in the cache
DECODED: Final = 1 << 20  # numbers decoded at a time: the decoders' scratch is a few times that
NARROW: Final = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
ENCODED: Final = tuple(kind for kind in Type if kind.name in LAYOUTS)


def as_tensor(container: Container, entry: Entry) -> Tensor:
    """Returns a tensor that is a view of the file for plain types, and decoded to float32 when read otherwise; its
    blocks, a view too, are what it has packed."""
    if entry.type in PLAIN:
        dtype = PLAIN[entry.type]
        return Tensor(entry.shape, dtype, lambda: container.bytes_of(entry).view(dtype).reshape(entry.shape))
    packed = _packed(container, entry) if entry.type.name in LAYOUTS and len(entry.shape) == 2 else None
    return Tensor(entry.shape, np.dtype(np.float32), lambda: decode(container, entry), packed)


def _packed(container: Container, entry: Entry) -> Packed:
    layout, (rows, columns) = LAYOUTS[entry.type.name], entry.shape
    shape = (rows, columns // layout.numbers * layout.bytes)

    def read() -> np.ndarray:
        blocks = container.bytes_of(entry).reshape(-1, layout.bytes)
        for at in layout.halves:
            if not np.isfinite(blocks[:, at : at + 2].copy().view("<f2")).all():
                raise CheckpointError(
                    f"{container.path}: tensor {entry.name!r}: expected blocks with finite scales, found NaN or "
                    "infinity; packed=False, allow_nan=True take them"
                )
        return blocks.reshape(shape)

    return Packed(layout.name.lower(), {"blocks": Tensor(shape, np.dtype(np.uint8), read)})


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


def encode(array: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yields the bytes of `array` [..., columns], a chunk of rows at a time.

    kind: F32, F16, BF16 or one of `ENCODED`, of whose blocks rows have whole numbers. importance: float32 [columns],
    weights of the squared errors, where they are known. Raises FloatingPointError where a number, or a block's scale,
    does not fit float16, and where blocks are to hold what is not finite.
    """
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    step = max(1, CHUNK // rows.shape[1])
    encoder = _plain if kind in PLAIN else _blocks
    for i in range(0, len(rows), step):
        yield encoder(rows[i : i + step], kind, importance)


def _plain(rows: np.ndarray, kind: Type, _: np.ndarray | None) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise FloatingPointError("expected numbers, found NaN or infinite ones")
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(rows.astype(PLAIN[kind], copy=False)).view(np.uint8)
    except FloatingPointError:
        raise FloatingPointError(f"expected numbers that fit {kind.name}, found larger ones") from None


def _blocks(rows: np.ndarray, kind: Type, importance: np.ndarray | None) -> np.ndarray:
    if rows.dtype not in NARROW:
        with np.errstate(over="ignore"):  # infinities are refused by the encoder
            rows = rows.astype(np.float32, copy=False)
    return encode_rows(rows, kind.name, importance)
