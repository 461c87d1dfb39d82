"""The metadata of a GGUF file: typed values read one after the other, each checked against what is left of the file."""

import enum
import mmap
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final, final

import numpy as np

from xlathe.errors import CheckpointError

ALIGNMENT: Final = "general.alignment"
# What a file may make us allocate beside views of itself: ten times what the largest models need.
MOST_OBJECTS: Final = 1 << 21  # strings and nested arrays
MOST_KEYS: Final = 1 << 16
DEEPEST: Final = 8


class Kind(enum.IntEnum):
    """Types of metadata values, by the number that the file gives them."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: Final[Mapping[Kind, np.dtype[Any]]] = {
    Kind.UINT8: np.dtype("u1"),
    Kind.INT8: np.dtype("i1"),
    Kind.UINT16: np.dtype("<u2"),
    Kind.INT16: np.dtype("<i2"),
    Kind.UINT32: np.dtype("<u4"),
    Kind.INT32: np.dtype("<i4"),
    Kind.FLOAT32: np.dtype("<f4"),
    Kind.BOOL: np.dtype("?"),
    Kind.UINT64: np.dtype("<u8"),
    Kind.INT64: np.dtype("<i8"),
    Kind.FLOAT64: np.dtype("<f8"),
}


@final
class Cursor:
    """A place in a mapped file, which moves forward as values are taken."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.position = data, where, 0
        self._objects = 0

    def fail(self, what: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what} at byte {self.position}: expected {expected}, found {found}")

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def skip(self, size: int, what: str) -> int:
        """Moves on by `size` bytes, returns where they begin."""
        if size > self.left:
            raise self.fail(what, f"{size} bytes", f"the end of the file after {self.left}")
        start = self.position
        self.position += size
        return start

    def number(self, form: str, what: str) -> int:
        start = self.skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, start)[0]

    def string(self, what: str) -> str:
        self._count_objects(1, what)
        size = self.number("<Q", f"length of {what}")
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(what, "UTF-8", f"{error.reason} after {error.start} of {size} bytes") from None

    def kind(self, what: str) -> Kind:
        number = self.number("<I", f"type of {what}")
        if number not in DTYPES and number not in (Kind.STRING, Kind.ARRAY):
            raise self.fail(f"type of {what}", f"0 to {max(Kind)}", number)
        return Kind(number)

    def value(self, kind: Kind, what: str, depth: int = 0) -> Any:
        """Returns a Python scalar, a string, an array of numbers (a view of the map) or a list of strings or arrays."""
        if kind is Kind.STRING:
            return self.string(what)
        if kind is Kind.ARRAY:
            return self._array(what, depth)
        return self._numbers(kind, 1, what)[0].item()

    def _array(self, what: str, depth: int) -> Any:
        if depth == DEEPEST:
            raise self.fail(what, f"arrays at most {DEEPEST} deep", "a deeper one")
        kind, length = self.kind(f"items of {what}"), self.number("<Q", f"length of {what}")
        if kind in DTYPES:
            return self._numbers(kind, length, what)
        shortest = 8 if kind is Kind.STRING else 12
        if length * shortest > self.left:
            raise self.fail(what, f"{length} items of at least {shortest} bytes", f"{self.left} bytes")
        self._count_objects(length, what)
        if kind is Kind.STRING:
            return self._strings(length, what)
        return [self.value(kind, what, depth + 1) for _ in range(length)]

    def _strings(self, length: int, what: str) -> list[str]:
        """Reads as `string` does, in a loop that is quick for vocabularies."""
        data, position, end = self.data, self.position, len(self.data)
        size_at, found = struct.Struct("<Q").unpack_from, list[bytes]()
        for _ in range(length):
            start = position + 8
            position = start + size_at(data, position)[0] if start <= end else end + 1
            if position > end:
                raise self.fail(f"item {len(found)} of {what}", "a string", "the end of the file")
            found.append(data[start:position])
        self.position = position
        try:
            return [item.decode("utf-8") for item in found]
        except UnicodeDecodeError as error:
            raise self.fail(what, "UTF-8", f"{error.reason} in {error.object[:64]!r}") from None

    def _numbers(self, kind: Kind, length: int, what: str) -> np.ndarray:
        dtype = DTYPES[kind]
        start = self.skip(length * dtype.itemsize, what)
        if kind is Kind.BOOL:
            raw = np.frombuffer(self.data, np.uint8, length, start)
            if length and raw.max() > 1:
                raise self.fail(what, "booleans of 0 or 1", int(raw.max()))
        return np.frombuffer(self.data, dtype, length, start)

    def _count_objects(self, count: int, what: str) -> None:
        self._objects += count
        if self._objects > MOST_OBJECTS:
            raise self.fail(what, f"at most {MOST_OBJECTS} strings and arrays in a file", "more")


def read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """Returns the `count` pairs of a key and a value that follow."""
    if count > MOST_KEYS or count * 13 > cursor.left:
        raise cursor.fail("number of keys", f"at most {min(MOST_KEYS, cursor.left // 13)}", count)
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a key")
        if key in metadata:
            raise cursor.fail(f"key {key!r}", "each key once", "it again")
        metadata[key] = cursor.value(cursor.kind(f"key {key!r}"), f"key {key!r}")
    return metadata


def write_metadata(metadata: Mapping[str, Any]) -> Iterable[bytes]:
    """Yields the bytes of each pair; see `_kind_of` for how the types are chosen."""
    for key, value in metadata.items():
        kind = _kind_of(value)
        yield write_string(key) + struct.pack("<I", kind) + _bytes_of(kind, value)


def write_string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _kind_of(value: Any) -> Kind:
    """NumPy's values say their type; an int is a UINT32 where it fits, a float a FLOAT32, as llama.cpp expects them."""
    if isinstance(value, str):
        return Kind.STRING
    if isinstance(value, list | tuple | np.ndarray):
        return Kind.ARRAY
    if isinstance(value, np.generic):
        return _kind_of_dtype(value.dtype)
    if isinstance(value, bool):
        return Kind.BOOL
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return Kind.UINT32
        return Kind.INT32 if -(1 << 31) <= value < 0 else Kind.INT64 if value < 0 else Kind.UINT64
    if isinstance(value, float):
        return Kind.FLOAT32
    raise CheckpointError(f"GGUF metadata holds numbers, strings and arrays; got {value!r} of {type(value).__name__}")


def _kind_of_dtype(dtype: np.dtype[Any]) -> Kind:
    for kind, known in DTYPES.items():
        if known == dtype:
            return kind
    raise CheckpointError(f"GGUF metadata holds integers, floats and booleans; got the dtype {dtype}")


def _bytes_of(kind: Kind, value: Any) -> bytes:
    if kind is Kind.STRING:
        return write_string(value)
    if kind is Kind.ARRAY:
        return _array_bytes(value)
    return np.asarray(value, DTYPES[kind]).tobytes()


def _array_bytes(items: Any) -> bytes:
    """Lists of numbers are INT32, FLOAT32 or BOOL: the types that llama.cpp reads them as."""
    if isinstance(items, np.ndarray):
        kind = _kind_of_dtype(items.dtype)
        return struct.pack("<IQ", kind, len(items)) + items.astype(DTYPES[kind]).tobytes()
    kinds = {_kind_of(item) for item in items}
    if kinds <= {Kind.UINT32, Kind.INT32}:
        return _array_bytes(np.asarray(items, np.int32))
    if len(kinds) > 1:
        raise CheckpointError(f"a GGUF array has items of one type; got {', '.join(sorted(k.name for k in kinds))}")
    (kind,) = kinds
    return struct.pack("<IQ", kind, len(items)) + b"".join(_bytes_of(kind, item) for item in items)
