"""Rules between the tensors of a GGUF file and those of Hugging Face: names, and what has to be done to the arrays.

Patterns name a layer `{b}` and an expert `{e}`. A rule finds what is there, and leaves the rest to other rules.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Final, final

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.checkpoint import Tensor
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.changes import Change, Config, Same
from xlathe.models.formats.gguf.container import Container

SUFFIXES: Final = (".weight", ".bias")
Found = tuple[str, Tensor, tuple[str, ...]]
"""A tensor under its Hugging Face name, and the names in the file that it is made of."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that will be in a file: its parts in the order of its outermost axis, each read when it is written.

    sources: the Hugging Face names that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Callable[[], np.ndarray], ...]
    sources: tuple[str, ...]


class Rule(abc.ABC):
    """One line of an architecture's table."""

    @abc.abstractmethod
    def read(self, file: Container, config: Config, b: int) -> Iterator[Found]:
        """Yields what the file has for layer `b`."""

    @abc.abstractmethod
    def write(self, tensors: Mapping[str, Tensor], config: Config, b: int) -> Iterator[Planned]:
        """Yields what goes to the file for layer `b`."""


@final
@dataclasses.dataclass(frozen=True)
class Renamed(Rule):
    """One tensor for one; without `exact` both names are stems of a weight and a bias."""

    name: str
    hf: str
    change: Change = Same()  # noqa: RUF009 (it has no state)
    exact: bool = False

    def read(self, file: Container, config: Config, b: int) -> Iterator[Found]:
        for name, hf in self._names(b):
            if name in file.entries:
                tensor = as_tensor(file, file.entries[name])
                yield hf, changed(tensor, self.change, config, f"{file.path}: tensor {name!r}"), (name,)

    def write(self, tensors: Mapping[str, Tensor], config: Config, b: int) -> Iterator[Planned]:
        for name, hf in self._names(b):
            if hf in tensors:
                tensor = tensors[hf]
                read = checked(tensor, lambda a: self.change.to_file(a, config), f"tensor {hf!r}")
                yield Planned(name, self.change.shape(tensor.shape), (read,), (hf,))

    def _names(self, b: int) -> list[tuple[str, str]]:
        return [(self.name.format(b=b) + s, self.hf.format(b=b) + s) for s in ([""] if self.exact else SUFFIXES)]


@final
@dataclasses.dataclass(frozen=True)
class Experts(Rule):
    """The experts' matrices, one tensor each in Hugging Face, stacked in the file. count: the config's keys for it."""

    name: str
    hf: str
    count: tuple[str, ...]

    def read(self, file: Container, config: Config, b: int) -> Iterator[Found]:
        name = self.name.format(b=b)
        if (entry := file.entries.get(name)) is None:
            return
        if len(entry.shape) != 3 or entry.shape[0] != self._count(config):
            expected = f"{self._count(config)} matrices"
            raise CheckpointError(f"{file.path}: tensor {name!r}: expected {expected}, found {list(entry.shape)}")
        for e in range(entry.shape[0]):
            yield self.hf.format(b=b, e=e), as_tensor(file, entry.part(e)), (name,)

    def write(self, tensors: Mapping[str, Tensor], config: Config, b: int) -> Iterator[Planned]:
        names = [self.hf.format(b=b, e=e) for e in range(self._count(config))]
        present = [name for name in names if name in tensors]
        if not present:
            return
        first = tensors[present[0]]
        for name in names:
            if name not in tensors or tensors[name].shape != first.shape:
                found = list(tensors[name].shape) if name in tensors else "none"
                raise CheckpointError(f"tensor {name!r}: expected {list(first.shape)} as other experts, found {found}")
        parts = tuple(tensors[name].read for name in names)
        yield Planned(self.name.format(b=b), (len(names), *first.shape), parts, tuple(names))

    def _count(self, config: Config) -> int:
        return next((config[key] for key in self.count if config.get(key)), 0)


@final
@dataclasses.dataclass(frozen=True)
class Older(Rule):
    """What files of older converters have instead: read, and not written."""

    rule: Rule

    def read(self, file: Container, config: Config, b: int) -> Iterator[Found]:
        return self.rule.read(file, config, b)

    def write(self, tensors: Mapping[str, Tensor], config: Config, b: int) -> Iterator[Planned]:
        return iter(())


def changed(tensor: Tensor, change: Change, config: Config, what: str) -> Tensor:
    """Returns `tensor` of a file as Hugging Face has it; rows that are packed are moved as they are."""

    def read(part: Tensor, change: Change) -> Callable[[], np.ndarray]:
        return checked(part, lambda array: change.from_file(array, config), what)

    packed, rows = tensor.packed, change.rows
    if packed is not None and rows is not None:
        parts = {name: Tensor(part.shape, part.dtype, read(part, rows)) for name, part in packed.parts.items()}
        packed = dataclasses.replace(packed, parts=parts)
    kept = None if rows is None else packed
    return Tensor(change.shape(tensor.shape), change.dtype(tensor.dtype), read(tensor, change), kept)


def checked(tensor: Tensor, function: Callable[[np.ndarray], np.ndarray], what: str) -> Callable[[], np.ndarray]:
    """Returns a reader that applies `function`; a shape that it cannot handle is a CheckpointError."""

    def read() -> np.ndarray:
        try:
            return function(tensor.read())
        except ValueError as error:
            raise CheckpointError(f"{what}: the shape {list(tensor.shape)} does not fit the config: {error}") from None

    return read
