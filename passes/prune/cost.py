"""What a graph costs, counted from shapes alone, also for shapes that it does not have yet."""

import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.coupling import Coupling
from xlathe.dimensions import Dimensions, Kept, Label
from xlathe.graph import Graph
from xlathe.passes.prune.plan import Cost

# Products, and the axes of their left side that they sum over.
SUMS: dict[str, Callable[[ir.JaxprEqn], Iterable[int]]] = {
    "dot_general": lambda eqn: [i for i, _ in Einsum.of(eqn).contracted],
    "ragged_dot_general": lambda eqn: eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0],
}


def cost(graph: Graph, coupling: Coupling, kept: Kept) -> Cost:
    """Returns the cost of the graph when only `kept` of each dimension stays; `coupling` is that of the graph."""

    def size(label: Label) -> int:
        n = coupling.dimensions.size_of(label, kept)
        return int(ir.substitute(n, dict.fromkeys(ir.dim_vars(n), 1)))  # of one token of one text

    def stays(var: ir.Var) -> bool:
        atom, number = coupling.members.get(var, (-1, 0))
        return atom not in kept or number in kept[atom]

    parameters = stored = 0
    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        if item.kind == "weight" and stays(var):
            count = math.prod(size(label) for label in coupling.values[var].labels)
            parameters += count
            stored += count * jnp.dtype(var.aval.dtype).itemsize
    flops = 0
    for eqn in ir.live_equations(graph.jaxpr):
        (out,) = eqn.outvars[:1]
        if eqn.primitive.name in SUMS and any("t" in ir.dim_vars(n) for n in out.aval.shape):
            left = eqn.invars[0]
            assert isinstance(left, ir.Var)
            summed = math.prod(size(coupling.values[left].labels[i]) for i in SUMS[eqn.primitive.name](eqn))
            flops += 2 * summed * math.prod(size(label) for label in coupling.values[out].labels)
    return Cost(parameters, stored, flops)


def weight_counts(graph: Graph, coupling: Coupling, counts: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters of each weight when `counts` of each atom stay, int64 [n] as each of the counts."""
    dims = coupling.dimensions

    def stays(var: ir.Var) -> np.ndarray | int:
        """Experts are alike: it is as if the first ones stayed."""
        atom, number = coupling.members.get(var, (-1, 0))
        return number < counts[atom] if atom in counts else 1

    return {
        item.name: np.prod([_count(dims, label, counts) for label in coupling.values[var].labels], axis=0) * stays(var)
        for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True)
        if item.kind == "weight"
    }


def _count(dims: Dimensions, label: Label, counts: Mapping[int, np.ndarray]) -> np.ndarray:
    total = np.ones_like(next(iter(counts.values())))
    for atom in dims.resolve(label):
        if atom in dims.parts:
            total = total * sum(_count(dims, part, counts) for part in dims.parts[atom])
        else:
            total = total * counts.get(atom, int(dims.sizes[atom]))
    return total
