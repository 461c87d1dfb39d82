"""What a graph costs, counted from shapes alone, also for shapes that it does not have yet."""

import math

import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.coupling import Coupling
from xlathe.dimensions import Kept, Label
from xlathe.graph import Graph
from xlathe.passes.prune.plan import Cost


def cost(graph: Graph, coupling: Coupling, kept: Kept) -> Cost:
    """Returns the cost of the graph when only `kept` of each dimension stays; `coupling` is that of the graph."""

    def size(label: Label) -> int:
        n = coupling.dimensions.size_of(label, kept)
        return 1 if ir.is_symbolic(n) else int(n)

    parameters = stored = 0
    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        if item.kind == "weight":
            count = math.prod(size(label) for label in coupling.values[var].labels)
            parameters += count
            stored += count * jnp.dtype(var.aval.dtype).itemsize
    flops = 0
    for eqn in ir.live_equations(graph.jaxpr):
        if eqn.primitive.name == "dot_general" and any("t" in ir.dim_vars(n) for n in eqn.outvars[0].aval.shape):
            left = _labels(coupling, eqn.invars[0])
            einsum = Einsum.of(eqn)
            summed = math.prod(size(left[i]) for i, _ in einsum.contracted)
            flops += 2 * summed * math.prod(size(label) for label in coupling.values[eqn.outvars[0]].labels)
    return Cost(parameters, stored, flops)


def _labels(coupling: Coupling, atom: ir.Atom) -> tuple[Label, ...]:
    assert isinstance(atom, ir.Var)
    return coupling.values[atom].labels
