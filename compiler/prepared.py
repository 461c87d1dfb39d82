"""The arrays of a graph as tensors that are made when they are read."""

from typing import Any

import numpy as np

from xlathe.graph import Graph, Kind
from xlathe.safetensors_file import Tensor


class Prepared:
    """Makes the inputs of a graph when they are read; what one recipe makes is made once for reads in a row.

    names: of the inputs of these kinds, those that one recipe makes side by side.
    """

    def __init__(self, graph: Graph, *kinds: Kind) -> None:
        self.graph = graph
        groups = graph.weights.together(graph.names(*kinds))
        self._together = {name: group for group in groups for name in group}
        self._held: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._together)

    def tensor(self, name: str, line: int | None = None) -> Tensor:
        """Returns an input, or one line of it."""
        aval = self.graph.aval(name)
        shape = tuple(map(int, aval.shape))

        def read() -> np.ndarray:
            whole = self._read(name)
            return whole if line is None else whole[line]

        return Tensor(shape if line is None else shape[1:], np.dtype(aval.dtype), read)

    def _read(self, name: str) -> np.ndarray:
        if name not in self._held:
            self._held.clear()
            self._held.update(self.graph.weights.prepare(self._together[name]))
        return np.asarray(self._held[name])
