"""Writes a container: a header, then tensor by tensor, to a temporary name that is renamed when all is there."""

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType

from xlathe.errors import CheckpointError
from xlathe.files import replaced
from xlathe.models.formats.gguf.blocks import encode
from xlathe.models.formats.gguf.container import DEFAULT_ALIGNMENT, MAGIC, VERSION, tensor_size
from xlathe.models.formats.gguf.rules import Planned
from xlathe.models.formats.gguf.values import ALIGNMENT, write_metadata, write_string

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all tensors."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """A planned tensor and the type it is stored as.

    importance: float32 [matrices, columns], the weights of squared errors, where they are known.
    """

    plan: Planned
    type: GGMLQuantizationType
    importance: np.ndarray | None = None

    @property
    def size(self) -> int:
        return tensor_size(self.plan.shape, self.type)


def write_container(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Typed], progress: Progress) -> None:
    """Writes a file at `path`, or leaves what was there. Raises CheckpointError for numbers that do not fit a type."""
    metadata = {key: value for key, value in metadata.items() if key != ALIGNMENT}
    total, done = sum(tensor.size for tensor in tensors), 0
    with replaced(path) as file:
        _pad(file, file.write(_header(metadata, tensors)))
        for tensor in tensors:
            written = 0
            for size in _write_tensor(file, tensor):
                written += size
                progress(done + written, total)
            if written != tensor.size:
                raise CheckpointError(
                    f"tensor {tensor.plan.name!r}: expected {tensor.size} bytes of {list(tensor.plan.shape)},"
                    f" found {written}"
                )
            done += written
            _pad(file, written)


def _header(metadata: Mapping[str, Any], tensors: Sequence[Typed]) -> bytes:
    counts = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    infos, offset = [], 0
    for tensor in tensors:
        shape = tensor.plan.shape[::-1]
        place = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, offset)
        infos.append(write_string(tensor.plan.name) + place)
        offset += -(-tensor.size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return b"".join([counts, *write_metadata(metadata), *infos])


def _write_tensor(file: BinaryIO, tensor: Typed) -> Iterator[int]:
    """Writes the parts as they are read; yields the bytes of each chunk."""
    try:
        for matrix, importance in _matrices(tensor):
            for chunk in encode(matrix, tensor.type, importance):
                yield file.write(chunk.data)
    except FloatingPointError as error:
        hint = "; BF16 and F32 hold them" if "larger" in str(error) else ""
        raise CheckpointError(f"tensor {tensor.plan.name!r}: {error}{hint}") from None


def _matrices(tensor: Typed) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields the parts; where importance is known, matrix by matrix with its own."""
    if tensor.importance is None:
        yield from ((read(), None) for read in tensor.plan.parts)
        return
    weights = iter(tensor.importance)
    for read in tensor.plan.parts:
        part = read()
        yield from ((matrix, next(weights)) for matrix in part.reshape(-1, *part.shape[-2:]))


def _pad(file: BinaryIO, written: int) -> None:
    file.write(bytes(-written % DEFAULT_ALIGNMENT))
