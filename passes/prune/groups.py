"""The groups of a graph that can be pruned, and what stays of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xlathe import jaxpr as ir
from xlathe.coupling import couple
from xlathe.graph import Graph
from xlathe.passes.prune.plan import Group, Kind
from xlathe.sections import cut_points


class Groups:
    """The prunable groups of a graph: atoms with their kind, and the weights' axes that hold them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.coupling = couple(graph)
        self.dims = self.coupling.dimensions
        self.axes: dict[int, list[tuple[str, int]]] = {}
        for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
            for axis, label in enumerate(self.coupling.values[var].labels if item.kind == "weight" else ()):
                for atom in self.dims.atoms(label):
                    self.axes.setdefault(atom, []).append((item.name, axis))
        stream = self._stream()
        heads = {a for label in self.coupling.heads for a in self.dims.resolve(label)}
        features = {a for label in self.coupling.features for a in self.dims.atoms(label)}
        depths = {a for label in self.coupling.depths for a in self.dims.atoms(label)}
        for atom in features & depths:
            self.dims.block((atom,), "it is a channel of values and of keys at once")
        other = self._inside_attention() | self._residual()
        self.kinds: dict[int, Kind] = {}
        for atom in self.dims.leaves():
            size = self.dims.sizes[atom]
            fixed = atom in self.dims.blocked or ir.is_symbolic(size) or not size or atom not in self.axes
            if not fixed and atom in self.coupling.routings:
                self.kinds[atom] = "experts"
            elif not fixed and atom in heads:
                self.kinds[atom] = "heads"
            elif not fixed and atom in features:
                self.kinds[atom] = "value_dims"
            elif not fixed and atom in depths:
                self.kinds[atom] = "query_key_dims"
            elif not fixed and atom in stream:
                self.kinds[atom] = "hidden"
            elif not fixed and atom not in other:
                self.kinds[atom] = "neurons"

    def _inside_attention(self) -> set[int]:
        equations = [eqn for eqn in self.graph.jaxpr.eqns if ir.is_op(eqn, "attention")]
        values = [a for eqn in equations for a in (*eqn.invars[:3], *eqn.outvars)]
        return {a for v in values if isinstance(v, ir.Var) for a in self._atoms(v)}

    def _residual(self) -> set[int]:
        return {a for v in cut_points(self.graph) for a in self._atoms(v)}

    def _stream(self) -> set[int]:
        """The features of the residual stream, where they are one axis, no result, and counted by means alone."""
        labels = {self.dims.resolve(self.coupling.values[v].labels[-1]) for v in cut_points(self.graph)}
        stream = {label[0] for label in labels if len(label) == 1}
        for label, reason in self.coupling.sums:
            if stream & self.dims.atoms(label):
                self.dims.block(label, reason)
        return stream - set(self.dims.blocked)

    def _atoms(self, var: ir.Var) -> set[int]:
        return {a for label in self.coupling.values[var].labels for a in self.dims.atoms(label)}

    def least(self, atom: int) -> int:
        """How many indices must stay: one, or as many experts as a token gets."""
        routing = self.coupling.routings.get(atom)
        return 1 if routing is None else routing.chosen

    def members(self, atom: int) -> dict[str, int]:
        """Returns the weights that are of one expert alone, and its number."""
        names = dict(zip(self.graph.jaxpr.invars, (item.name for item in self.graph.inputs), strict=True))
        return {names[var]: number for var, (a, number) in self.coupling.members.items() if a == atom}

    def start(self, atom: int, place: tuple[str, int]) -> int:
        """The first index of a weight's axis that belongs to an atom."""
        return int(np.argmax(self.dims.index(self.label(*place), atom) >= 0))

    def find(self, group: Group) -> int | None:
        """Returns the atom that a plan's group is; None where this graph has no such."""
        same = [
            a
            for a, kind in self.kinds.items()
            if (kind, self.dims.sizes[a], tuple(self.axes[a])) == (group.kind, group.size, group.axes)
        ]
        if len(same) == 1:
            return same[0]
        return next((a for a in same if self.start(a, group.axes[0]) == group.start), None)

    def reasons(self) -> Iterator[str]:
        """Why dimensions of weights cannot shrink."""
        for atom, axes in self.axes.items():
            if atom in self.dims.blocked:
                yield f"{axes[0][0]} axis {axes[0][1]}: {self.dims.blocked[atom]}"

    def add(self, total: np.ndarray, values: np.ndarray, labels: list[Any], atom: int) -> None:
        """Adds values, one an index of the axes with these labels, to the totals of the atom's indices."""
        owner = self.dims.index(tuple(a for label in labels for a in label), atom)
        np.add.at(total, owner[owner >= 0], values[owner >= 0])

    def label(self, name: str, axis: int) -> tuple[int, ...]:
        var = next(v for v, i in zip(self.graph.jaxpr.invars, self.graph.inputs, strict=True) if i.name == name)
        return self.coupling.values[var].labels[axis]


MULTIPLES: Mapping[Kind, int] = {
    "heads": 1, "experts": 1, "value_dims": 8, "query_key_dims": 4, "neurons": 32, "hidden": 32
}  # fmt: skip
"""Sizes are kept in multiples of these where they were such: group-wise formats and vector units want it."""


def choose(
    found: Groups, scores: Mapping[int, np.ndarray], removed: Mapping[Kind, float]
) -> tuple[list[Group], dict[int, np.ndarray]]:
    """Returns the groups that shrink when a fraction of each kind goes, the lowest scores first, and what stays.

    A group without scores stays whole.
    """
    groups, kept = [], {}
    for atom, kind in found.kinds.items():
        size = int(found.dims.sizes[atom])
        count = count_kept(kind, size, removed.get(kind, 0.0), found.least(atom))
        if count == size or atom not in scores:
            continue
        assert len(scores[atom]) == size
        kept[atom] = np.sort(np.argsort(-scores[atom], kind="stable")[:count])
        axes = tuple(found.axes[atom])
        start = found.start(atom, axes[0])
        groups.append(Group(kind, size, axes, tuple(kept[atom].tolist()), tuple(scores[atom].tolist()), start))
    return groups, kept


def count_kept(kind: Kind, size: int, fraction: float, least: int) -> int:
    """Returns how many of `size` stay: at least `least`, and a multiple where the size was one."""
    multiple = MULTIPLES[kind]
    count = max(least, size - round(size * fraction))
    return -(-count // multiple) * multiple if size % multiple == 0 else count
