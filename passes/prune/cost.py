"""What a graph costs, counted from shapes alone, also for shapes that it does not have yet."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

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


def weight_counts(
    graph: Graph, coupling: Coupling, counts: Mapping[int, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each weight with its parameters when `counts` of each atom stay, int64 [n] as each of the counts."""
    dims = coupling.dimensions

    def stays(var: ir.Var) -> np.ndarray | int:
        """Experts are alike: it is as if the first ones stayed."""
        atom, number = coupling.members.get(var, (-1, 0))
        return number < counts[atom] if atom in counts else 1

    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        if item.kind == "weight":
            axes = [_count(dims, label, counts) for label in coupling.values[var].labels]
            yield item.name, np.prod(axes, axis=0) * stays(var)


def weight_reads(
    graph: Graph, coupling: Coupling, counts: Mapping[int, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each weight with the bytes of it that one token reads, as `weight_counts`: none of what is looked up by
    row, and of experts as much as those that a token gets have."""
    consumer, dims = ir.consumers(ir.live_equations(graph.jaxpr)), coupling.dimensions

    def looked_up(var: ir.Var) -> bool:
        return all(
            eqn.primitive.name == "gather" and any(map(ir.is_symbolic, eqn.outvars[0].aval.shape))
            for eqn in consumer.get(var, ())
        )

    def share(var: ir.Var) -> np.ndarray | float:
        owner = coupling.members.get(var, (None, 0))[0]
        stacked = {a for label in coupling.values[var].labels for a in dims.atoms(label)} & set(coupling.routings)
        experts = owner if owner is not None else min(stacked, default=None)
        if experts is None:
            return 0.0 if looked_up(var) else 1.0
        return coupling.routings[experts].chosen / counts.get(experts, int(dims.sizes[experts]))

    variables = {item.name: var for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True)}
    for name, size in weight_counts(graph, coupling, counts):
        yield name, size * jnp.dtype(graph.aval(name).dtype).itemsize * share(variables[name])


def cache_reads(graph: Graph, coupling: Coupling, counts: Mapping[int, np.ndarray]) -> np.ndarray:
    """Returns the bytes of keys and values that one token reads where the cache is full, int64 as the counts."""
    total = np.zeros_like(next(iter(counts.values())))
    for eqn in ir.live_equations(graph.jaxpr):
        for var in eqn.invars[1:3] if ir.is_op(eqn, "attention") else ():
            assert isinstance(var, ir.Var)
            heads, channels = (_count(coupling.dimensions, ls, counts) for ls in coupling.values[var].labels[2:])
            total = total + graph.max_len * heads * channels * jnp.dtype(var.aval.dtype).itemsize
    return total


def _count(dims: Dimensions, label: Label, counts: Mapping[int, np.ndarray]) -> np.ndarray:
    total = np.ones_like(next(iter(counts.values())))
    for atom in dims.resolve(label):
        if atom in dims.parts:
            total = total * sum(_count(dims, part, counts) for part in dims.parts[atom])
        else:
            total = total * counts.get(atom, int(dims.sizes[atom]))
    return total
