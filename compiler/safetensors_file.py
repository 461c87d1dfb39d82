"""safetensors: a JSON header of names, dtypes, shapes and places, then the numbers. Read mapped, written streamed.

The format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xlathe.errors import CheckpointError, brief
from xlathe.files import replaced

DTYPES: Mapping[str, Any] = {  # by their names in the header
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as the reference implementation has it
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a file, read when it is asked for.

    shape: outermost axis first; dtype: as NumPy (with ml_dtypes) names it, also where the file holds blocks of codes;
    read: returns the array, a view of the mapped file where the file holds plain numbers. packed: the same matrix as
    the file holds it, where a storage format has that form.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    packed: "Packed | None" = None

    @property
    def nbytes(self) -> int:
        """The bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix [n, k], n outputs by k inputs, as a file holds it: in the parts of a storage format, not rounded anew.

    format: text of a storage format (`xlathe.storage`); parts: what it stores, by the suffix of its name, of the shapes
    and dtypes that the format has for [n, k]; activations: how they are rounded, if at all (`xlathe.ops.activations`);
    if in one step for all, that is the part `input`, float32 [].
    """

    format: str
    parts: Mapping[str, Tensor]
    activations: str | None = None

    @property
    def scheme(self) -> str:
        """The text of format and activations, `int8:channel,a=int8_token`."""
        rounded = f"{',' if ':' in self.format else ':'}a={self.activations}"
        return self.format + (rounded if self.activations else "")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the arrays of a file in the order of their places; each is a view of the mapped file.

    Raises CheckpointError, naming the file and the tensor, for anything that does not follow the format. Nothing is
    allocated by what the header says: only what lies in the file is mapped.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: expected a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            header, start = _header(file.read(8), size, path), 0
            start = 8 + header
            entries = _parse(file.read(header), path)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size > start else None
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    places = {name: _place(name, entry, size - start, path) for name, entry in entries.items()}
    ordered = sorted(places.items(), key=lambda item: item[1][2])
    _check_places([(name, begin, end) for name, (_, _, begin, end) in ordered], size - start, path)
    return {name: _tensor(mapped, start + begin, shape, dtype) for name, (shape, dtype, begin, _) in ordered}


def _header(first: bytes, size: int, path: Path) -> int:
    if len(first) < 8:
        raise CheckpointError(f"{path}: {size} bytes: too short for a safetensors file")
    length = int.from_bytes(first, "little")
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{path}: its header says it has {length:,} bytes; expected at most {min(MAX_HEADER, size - 8):,} (a "
            f"truncated file, or no safetensors)"
        )
    return length


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{path}: {brief(twice)} is there twice")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is no JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is no JSON object")
    entries.pop("__metadata__", None)
    return entries


Place = tuple[tuple[int, ...], np.dtype[Any], int, int]


def _place(name: str, entry: Any, size: int, path: Path) -> Place:
    """Returns shape, dtype, first and last byte of a tensor; the bytes lie in the file and hold the shape."""

    def whole(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)

    where = f"{path}: {brief(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {brief(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {brief(code)}; expected one of {', '.join(DTYPES)}")
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise CheckpointError(f"{where}: malformed shape {brief(shape)} or data_offsets {brief(offsets)}")
    begin, end = offsets
    if not begin <= end <= size:
        raise CheckpointError(f"{where} lies at {begin:,} to {end:,} of {size:,} bytes: truncated?")
    dtype = np.dtype(DTYPES[code])
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{where}: {code} {brief(shape)} takes {math.prod(shape) * dtype.itemsize:,} bytes, found "
            f"{end - begin:,}"
        )
    return tuple(shape), dtype, begin, end


def _check_places(places: list[tuple[str, int, int]], size: int, path: Path) -> None:
    reached, before = 0, ""
    for name, begin, end in places:
        if begin != reached:
            what = f"overlaps {brief(before)}" if begin < reached else f"leaves a hole after {brief(before)}"
            raise CheckpointError(f"{path}: {brief(name)} {what}: expected it at byte {reached:,}, found {begin:,}")
        reached, before = end, name
    if reached != size:
        raise CheckpointError(f"{path}: expected {reached:,} bytes of numbers, found {size:,}")


def _tensor(mapped: mmap.mmap | None, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    def read() -> np.ndarray:
        if mapped is None or not math.prod(shape):
            return np.empty(shape, dtype)
        return np.frombuffer(mapped, dtype, math.prod(shape), start).reshape(shape)

    return Tensor(shape, dtype, read)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    wrote: Callable[[int], None] = lambda size: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors one at a time, in their order, under a temporary name until all are there.

    In the file wide numbers come first, so that each array lies aligned in a format without padding.
    wrote: told the bytes of each tensor; metadata: texts for other readers.
    Raises CheckpointError where the file cannot be written, a dtype has no name in the format, or an array is not what
    its tensor said.
    """
    places = _places(path, tensors)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (begin, end) in places.items():
        tensor = tensors[name]
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with replaced(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors.items():
            begin, end = places[name]
            file.seek(8 + len(header) + begin)
            array = np.asarray(tensor.read())
            if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
                found = f"{array.dtype}{list(array.shape)}"
                raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}{list(tensor.shape)}, and {found} was made")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            wrote(end - begin)


def _places(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Returns where each tensor begins and ends after the header."""
    places, reached = {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        tensor = tensors[name]
        if tensor.dtype not in CODES:
            raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}, which safetensors cannot hold")
        places[name] = reached, (reached := reached + tensor.nbytes)
    return places
