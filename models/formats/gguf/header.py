"""The metadata of one architecture, looked up by the key without its prefix, and checked by type."""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.container import Container

Value = int | float | bool | str


@dataclasses.dataclass(frozen=True)
class Header:
    """What `general.architecture` says, and `<architecture>.*`."""

    file: Container
    architecture: str

    @overload
    def get[T: Value](self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get[T: Value](self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Returns a value of type `kind`, or the default where the file does not say."""
        return lookup(self.file, f"{self.architecture}.{key}", kind, default)

    def need[T: Value](self, key: str, kind: type[T]) -> T:
        found = self.get(key, kind)
        if found is None:
            raise CheckpointError(f"{self.file.path}: expected the key {self.architecture + '.' + key!r}, found none")
        return found

    def shape(self, name: str, axes: int) -> Sequence[int]:
        """Returns the shape of a tensor that must be there."""
        entry = self.file.entries.get(name)
        if entry is None or len(entry.shape) != axes:
            found = "none" if entry is None else f"the shape {list(entry.shape)}"
            raise CheckpointError(f"{self.file.path}: expected a tensor {name!r} of {axes} axes, found {found}")
        return entry.shape


def lookup(file: Container, key: str, kind: type[Any], default: Any = None) -> Any:
    """Returns the value of a full key; floats are the shortest decimals that float32 stores as what is there."""
    value = file.metadata.get(key)
    if value is None:
        return default
    if kind is float and type(value) is float:
        with np.errstate(over="ignore"):
            return float(str(np.float32(value))) if np.float32(value) == value else value
    if type(value) is not kind and not (kind is float and type(value) is int):
        found = f"{type(value).__name__} {value!r}" if isinstance(value, Value) else type(value).__name__
        raise CheckpointError(f"{file.path}: key {key!r}: expected {kind.__name__}, found {found}")
    return kind(value)
