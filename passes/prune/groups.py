"""The groups of a graph that can be pruned, and how much each index of them matters."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from xlathe import jaxpr as ir
from xlathe.coupling import couple
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.observe import observe
from xlathe.passes.prune.plan import Group
from xlathe.passes.quantize.uses import plan_weights
from xlathe.pipeline import Context
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
        heads = {a for label in self.coupling.heads for a in self.dims.resolve(label)}
        other = self._inside_attention() | self._residual()
        self.kinds: dict[int, Literal["heads", "neurons"]] = {}
        for atom in self.dims.leaves():
            fixed = atom in self.dims.blocked or ir.is_symbolic(self.dims.sizes[atom]) or atom not in self.axes
            if not fixed and atom in heads:
                self.kinds[atom] = "heads"
            elif not fixed and atom not in other:
                self.kinds[atom] = "neurons"

    def _inside_attention(self) -> set[int]:
        equations = [eqn for eqn in self.graph.jaxpr.eqns if ir.is_op(eqn, "attention")]
        values = [a for eqn in equations for a in (*eqn.invars[:3], *eqn.outvars)]
        return {a for v in values if isinstance(v, ir.Var) for a in self._atoms(v)}

    def _residual(self) -> set[int]:
        return {a for v in cut_points(self.graph) for a in self._atoms(v)}

    def _atoms(self, var: ir.Var) -> set[int]:
        return {a for label in self.coupling.values[var].labels for a in self.dims.atoms(label)}

    def is_group(self, atom: int, group: Group) -> bool:
        """Says whether an atom is what a plan calls a group."""
        here = (self.kinds[atom], self.dims.sizes[atom], tuple(self.axes[atom]))
        return here == (group.kind, group.size, group.axes)

    def reasons(self) -> Iterator[str]:
        """Why dimensions of weights cannot shrink."""
        for atom, axes in self.axes.items():
            if atom in self.dims.blocked:
                yield f"{axes[0][0]} axis {axes[0][1]}: {self.dims.blocked[atom]}"

    def weight_scores(self) -> dict[int, np.ndarray]:
        """L2 norm over all elements of the weights that go with an index."""
        squares: dict[str, np.ndarray] = {}
        scores = {}
        for atom in self.kinds:
            total = np.zeros(int(self.dims.sizes[atom]))
            for name, axis in self.axes[atom]:
                if name not in squares:
                    squares[name] = np.square(np.asarray(self.graph.weights[name], np.float64))
                others = tuple(i for i in range(squares[name].ndim) if i != axis)
                self._add(total, squares[name].sum(axis=others), [self.label(name, axis)], atom)
            scores[atom] = np.sqrt(total)
        return scores

    def activation_scores(self, context: Context) -> dict[int, np.ndarray]:
        """L2 norm over calibration tokens of what an index feeds to the weights that sum over it."""
        if not len(context.calibration):
            raise OptionError(
                "score='activation' needs calibration tokens: pipeline(graph, calibration=batches) "
                "or --calibration=FILE"
            )
        stats = observe(self.graph, context.calibration, progress=context.progress).inputs
        layouts, _ = plan_weights(self.graph, list(self.graph.names("weight")))
        scores = {atom: np.zeros(int(self.dims.sizes[atom])) for atom in self.kinds}
        for name, found in stats.items():
            labels = [self.label(name, axis) for axis in layouts[name].contracted]
            for atom in scores:
                if any(atom in self.dims.atoms(label) for label in labels):
                    self._add(scores[atom], found.sum_squares, labels, atom)
        return {atom: np.sqrt(total) for atom, total in scores.items()}

    def _add(self, total: np.ndarray, values: np.ndarray, labels: list[Any], atom: int) -> None:
        """Adds values, one an index of the axes with these labels, to the totals of the atom's indices."""
        owner = self.dims.index(tuple(a for label in labels for a in label), atom)
        np.add.at(total, owner[owner >= 0], values[owner >= 0])

    def label(self, name: str, axis: int) -> tuple[int, ...]:
        var = next(v for v, i in zip(self.graph.jaxpr.invars, self.graph.inputs, strict=True) if i.name == name)
        return self.coupling.values[var].labels[axis]
