"""Writes a container: a header, then tensor by tensor, to a temporary name that is renamed when all is there."""

import contextlib
import dataclasses
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGMLQuantizationType

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.blocks import encode
from xlathe.models.formats.gguf.container import DEFAULT_ALIGNMENT, MAGIC, VERSION, tensor_size
from xlathe.models.formats.gguf.rules import Planned
from xlathe.models.formats.gguf.values import ALIGNMENT, write_metadata, write_string

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all tensors."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """A planned tensor and the type it is stored as."""

    plan: Planned
    type: GGMLQuantizationType

    @property
    def size(self) -> int:
        return tensor_size(self.plan.shape, self.type)


def write_container(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Typed], progress: Progress) -> None:
    """Writes a file at `path`, or leaves what was there. Raises CheckpointError for numbers that do not fit a type."""
    metadata = {key: value for key, value in metadata.items() if key != ALIGNMENT}
    total, done = sum(tensor.size for tensor in tensors), 0
    with _replaced(path) as file:
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
    for read in tensor.plan.parts:
        try:
            for chunk in encode(read(), tensor.type):
                yield file.write(chunk.data)
        except FloatingPointError:
            raise CheckpointError(
                f"tensor {tensor.plan.name!r}: expected numbers that fit {tensor.type.name}, found larger ones;"
                " BF16 and F32 hold them"
            ) from None


def _pad(file: BinaryIO, written: int) -> None:
    file.write(bytes(-written % DEFAULT_ALIGNMENT))


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file beside `path`, which takes its place when the body ends, and vanishes when it fails."""
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a place to write to: {error.strerror}") from None
    try:
        with os.fdopen(number, "wb", buffering=1 << 20) as file:
            yield file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
