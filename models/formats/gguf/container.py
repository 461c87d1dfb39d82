"""The container: a header, metadata and the places of tensors in a mapped file.

Nothing that the file says is believed: counts, lengths, sizes and offsets are Python integers, and each is compared
with the file's size before anything is made of it.
"""

import dataclasses
import itertools
import math
import mmap
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from xlathe.errors import CheckpointError, as_path
from xlathe.models.formats.gguf.values import ALIGNMENT, Cursor, read_metadata

MAGIC: Final = b"GGUF"
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32
MOST_AXES: Final = 4
MOST_TENSORS: Final = 1 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is: shape (outermost axis first), type, first byte in the file and number of bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int

    def part(self, index: int) -> "Entry":
        """Returns the entry of one index of the outermost axis."""
        size = self.size // self.shape[0]
        return dataclasses.replace(self, shape=self.shape[1:], start=self.start + index * size, size=size)


@dataclasses.dataclass(frozen=True)
class Container:
    """A mapped GGUF file.

    metadata: arrays of numbers are NumPy views of the map, arrays of strings are lists; data: uint8 [file size].
    """

    path: Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]
    data: np.ndarray

    def bytes_of(self, entry: Entry) -> np.ndarray:
        """Returns a view, uint8 [entry.size]."""
        return self.data[entry.start : entry.start + entry.size]


def open_container(path: Any) -> Container:
    """Maps a file and reads its header. Raises CheckpointError for a file that is damaged or no GGUF of version 3."""
    path = as_path(path, CheckpointError)
    data = _map(path)
    cursor = Cursor(data, str(path))
    _check_version(cursor)
    tensors, keys = cursor.number("<Q", "number of tensors"), cursor.number("<Q", "number of keys")
    if tensors > MOST_TENSORS or tensors * 24 > cursor.left:
        raise cursor.fail("number of tensors", f"at most {min(MOST_TENSORS, cursor.left // 24)}", tensors)
    metadata = read_metadata(cursor, keys)
    alignment = _alignment(cursor, metadata)
    found = [_read_entry(cursor, alignment) for _ in range(tensors)]
    begin = -(-cursor.position // alignment) * alignment
    entries = {entry.name: _place(entry, begin, cursor) for entry in found}
    if len(entries) != len(found):
        raise CheckpointError(f"{path}: tensor {_repeated(e.name for e in found)!r} is there more than once")
    _check_overlaps(path, entries.values())
    return Container(
        path, types.MappingProxyType(metadata), types.MappingProxyType(entries), np.frombuffer(data, np.uint8)
    )


def tensor_size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Returns the number of bytes of whole blocks along the innermost axis."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"{path}: expected a GGUF file, found an empty one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a GGUF file: {error.strerror}") from None


def _check_version(cursor: Cursor) -> None:
    start = cursor.skip(4, "magic")
    magic = cursor.data[start : start + 4]
    if magic != MAGIC:
        raise CheckpointError(f"{cursor.where}: expected a GGUF file, which begins with {MAGIC!r}, found {magic!r}")
    version = cursor.number("<I", "version")
    if version != VERSION:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = f"version {version}" if version < swapped else f"a big-endian file of version {swapped}"
        raise CheckpointError(f"{cursor.where}: expected little-endian GGUF of version {VERSION}, found {found}")


def _alignment(cursor: Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"key {ALIGNMENT!r}", "a power of two", repr(alignment))
    return alignment


def _read_entry(cursor: Cursor, alignment: int) -> Entry:
    """Reads where a tensor is, `start` still relative to the data."""
    name = cursor.string("name of a tensor")
    what = f"tensor {name!r}"
    axes = cursor.number("<I", f"number of axes of {what}")
    if axes > MOST_AXES:
        raise cursor.fail(f"number of axes of {what}", f"at most {MOST_AXES}", axes)
    shape = tuple(cursor.number("<Q", f"shape of {what}") for _ in range(axes))[::-1]
    number, start = cursor.number("<I", f"type of {what}"), cursor.number("<Q", f"offset of {what}")
    if number not in GGML_QUANT_SIZES:
        known = f"one of {', '.join(str(int(kind)) for kind in GGML_QUANT_SIZES)}"
        raise cursor.fail(f"type of {what}", known, number)
    kind = GGMLQuantizationType(number)
    if 0 in shape:
        raise cursor.fail(f"shape of {what}", "no empty axis", list(shape))
    block, _ = GGML_QUANT_SIZES[kind]
    if (shape[-1] if shape else 1) % block:
        raise cursor.fail(f"shape of {what}", f"rows of whole blocks of {block}, as {kind.name} has", list(shape))
    if start % alignment:
        raise cursor.fail(f"offset of {what}", f"a multiple of {alignment}", start)
    return Entry(name, shape, kind, start, tensor_size(shape, kind))


def _place(entry: Entry, begin: int, cursor: Cursor) -> Entry:
    placed = dataclasses.replace(entry, start=begin + entry.start)
    if placed.start + placed.size > len(cursor.data):
        expected = f"{entry.size} bytes ({entry.type.name} {list(entry.shape)}) from byte {placed.start}"
        found = f"a file of {len(cursor.data)} bytes"
        raise CheckpointError(f"{cursor.where}: tensor {entry.name!r}: expected {expected}, found {found}")
    return placed


def _check_overlaps(path: Path, entries: Iterable[Entry]) -> None:
    ordered = sorted(entries, key=lambda entry: entry.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.size > after.start:
            raise CheckpointError(f"{path}: tensors {before.name!r} and {after.name!r} overlap at byte {after.start}")


def _repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
