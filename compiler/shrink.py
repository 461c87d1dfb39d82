"""Trace a graph again with some dimensions smaller.

Sizes are written into a program's parameters (`reshape`, `broadcast_in_dim`, slices); each is computed anew from the
labels of the value that it describes, and so is the number of terms that a mean divides by. Weights and constants
become smaller by recipes that take what stays; those of experts that go are gone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.coupling import Coupling
from xlathe.dimensions import Kept
from xlathe.graph import Graph, Origin, Recipe
from xlathe.ops import OPS
from xlathe.rewrite import drop_dead_inputs


@dataclasses.dataclass(frozen=True)
class Take:
    """Keeps some indices of some axes: array -> smaller array. axes: (axis, indices that stay)."""

    axes: tuple[tuple[int, tuple[int, ...]], ...]

    def __call__(self, array: Any) -> tuple[Any, ...]:
        for axis, indices in self.axes:
            array = jnp.take(array, np.asarray(indices), axis=axis)
        return (array,)


def shrink(graph: Graph, coupling: Coupling, kept: Kept) -> Graph:
    """Returns the graph with only `kept` of each atom, in the order given; `coupling` is that of this graph."""
    return _Shrinker(graph, coupling, kept).run()


class _Shrinker:
    def __init__(self, graph: Graph, coupling: Coupling, kept: Kept) -> None:
        self.graph, self.kept = graph, kept
        self.dims, self.values, self.means = coupling.dimensions, coupling.values, coupling.means
        members = coupling.members.items()
        self.gone = {var for var, (atom, i) in members if atom in kept and i not in set(kept[atom].tolist())}

    def run(self) -> Graph:
        jaxpr = self.graph.jaxpr
        avals = [jax.ShapeDtypeStruct(self._shape(v), v.aval.dtype) for v in jaxpr.invars]
        recipes, origins = [], []
        for item, var in zip(self.graph.inputs, jaxpr.invars, strict=True):
            if var in self.gone:
                continue
            axes = tuple(
                (i, tuple(self.dims.kept(label, self.kept).tolist()))
                for i, label in enumerate(self.values[var].labels)
                if self.dims.atoms(label) & set(self.kept)
            )
            if axes:
                recipes.append(Recipe(item.name, (item.name,), Take(axes)))
                origins.append(Origin(item.name, self._shape(var), (item.name,)))  # type: ignore[arg-type]
        weights = self.graph.weights.derive(*recipes)
        weights = dataclasses.replace(weights, origins=(*weights.origins, *origins))
        smaller = ir.trace(lambda *xs: ir.evaluate(jaxpr, xs, self._rule), *avals)
        small = self.graph.replace(jaxpr=smaller, weights=weights)
        return drop_dead_inputs(small, smaller, small.inputs) if self.gone else small

    def _shape(self, var: ir.Var) -> tuple[ir.Dim, ...]:
        return tuple(self.dims.size_of(label, self.kept) for label in self.values[var].labels)

    def _rule(self, eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        name, result = eqn.primitive.name, eqn.outvars[0]
        if ir.is_op(eqn):
            op = next(op for op in OPS if op.primitive is eqn.primitive)
            return [op(*operands, **ir.attributes(eqn))]
        if result in self.means:
            return self._mean(eqn, operands)
        if name == "reshape":
            return ir.bind(eqn, operands, new_sizes=self._shape(result))
        if name == "broadcast_in_dim":
            return ir.bind(eqn, operands, shape=self._shape(result))
        if name == "iota":
            return self._iota(eqn)
        if name == "stack":
            left = self.dims.kept(self._labels(result)[eqn.params["axis"]], self.kept)
            return ir.bind(eqn, [operands[i] for i in left])
        if name == "split":
            sizes = tuple(self._shape(out)[eqn.params["axis"]] for out in eqn.outvars)
            return ir.bind(eqn, operands, sizes=sizes)
        if name == "slice":
            return self._slice(eqn, operands)
        if name == "gather":
            shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
            new = operands[0].shape
            whole = tuple(n if ir.same_dim(s, m) else s for s, m, n in zip(sizes, shape, new, strict=True))
            return ir.bind(eqn, operands, slice_sizes=whole)
        return None

    def _mean(self, eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        """The number of terms is a literal, or one over it is."""
        label = self.means[eqn.outvars[0]]
        count = int(self.dims.size_of(label, self.kept))
        if count == self.dims.size(label):
            return None
        number = count if eqn.primitive.name == "div" else 1 / count
        literal = jnp.full((), number, eqn.outvars[0].aval.dtype)
        both = zip(eqn.invars, operands, strict=True)
        return ir.bind(eqn, [literal if isinstance(atom, ir.Literal) else value for atom, value in both])

    def _iota(self, eqn: ir.JaxprEqn) -> list[Any] | None:
        """What is left keeps its number."""
        axis, result = eqn.params["dimension"], eqn.outvars[0]
        label = self._labels(result)[axis]
        if not self.dims.atoms(label) & set(self.kept):
            return ir.bind(eqn, [], shape=self._shape(result))
        left = self.dims.kept(label, self.kept)
        runs = np.split(left, np.flatnonzero(np.diff(left) != 1) + 1)  # a program has no arrays but its inputs
        numbers = jnp.concatenate([jax.lax.iota(result.aval.dtype, len(run)) + int(run[0]) for run in runs])
        return [jax.lax.broadcast_in_dim(numbers, self._shape(result), (axis,))]

    def _slice(self, eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any]:
        starts, limits = [], []
        old, new = eqn.invars[0].aval.shape, operands[0].shape
        labels = self._labels(eqn.invars[0])
        for axis, (start, limit) in enumerate(
            zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)
        ):
            if ir.same_dim(old[axis], new[axis]):
                starts.append(start)
                limits.append(limit)
                continue
            left = self.dims.kept(labels[axis], self.kept)
            starts.append(int(np.sum(left < start)))
            limits.append(int(np.sum(left < limit)))
        return ir.bind(eqn, operands, start_indices=tuple(starts), limit_indices=tuple(limits))

    def _labels(self, atom: ir.Atom) -> tuple[tuple[int, ...], ...]:
        assert isinstance(atom, ir.Var)
        return self.values[atom].labels
