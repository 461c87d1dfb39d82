"""What a method merges: the tensors of one name, and parts of them as they are read."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from xlathe.passes.merge.combine import combine
from xlathe.passes.merge.scope import Kept
from xlathe.passes.merge.tasks import change


@dataclasses.dataclass(frozen=True)
class Group:
    """Blocks of the tensors of one name: some rows [rows, width], or a vector.

    tensors: of the models in their order, but for the base; base: its tensor, None where the method has none. each: a
    value a model, shared: one value, by the names of parameters. key: of what is drawn by chance, this name's own.
    kept: what ranks keep of each model's changes, where there are any. start: the place of the first number in the
    whole tensor. found: what the method measured in all of it.
    """

    tensors: Sequence[jax.Array]
    base: jax.Array | None
    each: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]
    key: jax.Array
    kept: Sequence[Kept] | None = None
    start: int = 0
    found: Any = None

    @property
    def weights(self) -> list[float]:
        return [float(weight) for weight in self.each["weight"]]

    @functools.cached_property
    def deltas(self) -> list[jax.Array]:
        assert self.base is not None
        return [change(tensor, self.base) for tensor in self.tensors]

    @property
    def all(self) -> list[jax.Array]:
        """The base, where there is one, and the others."""
        return [*([] if self.base is None else [self.base]), *self.tensors]

    @property
    def vectors(self) -> Sequence[jax.Array]:
        """The changes where there is a base, else the tensors."""
        return self.tensors if self.base is None else self.deltas

    @property
    def is_matrix(self) -> bool:
        return self.tensors[0].ndim > 1

    @property
    def row(self) -> int:
        """The place of the first row."""
        return self.start // max(self.tensors[0].shape[-1], 1) if self.is_matrix else 0

    def onto_base(self, delta: jax.Array) -> jax.Array:
        assert self.base is not None
        return combine([self.base, delta], [1, float(self.shared.get("lambda", 1))])


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The whole tensors of one name. count: of the models, without a base; size: of a tensor; each, shared: as of
    `Group`. read: yields their blocks in order, each time anew."""

    count: int
    size: int
    each: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]
    is_matrix: bool
    read: Callable[[], Iterator[Group]]
