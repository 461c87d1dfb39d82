"""The whole graph with what a plan removes set to zero: what a smaller graph must be equal to."""

import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.graph import Graph, Weights
from xlathe.passes.prune import PrunePlan
from xlathe.passes.prune.groups import Groups


def masked(graph: Graph, plan: PrunePlan) -> Graph:
    """Sets every weight of the graph to zero where an index is concerned that the plan removes."""
    found = Groups(graph)
    arrays = {name: jnp.asarray(graph.weights[name]) for name in graph.names("weight", "const")}
    kept: dict[int, np.ndarray] = {}
    for group in plan.groups:
        atom = found.find(group)
        assert atom is not None
        kept[atom] = np.asarray(group.kept)
        for name, axis in group.axes:
            owner = found.dims.index(found.label(name, axis), atom)
            stays = (owner < 0) | np.isin(owner, group.kept)
            shape = [-1 if i == axis else 1 for i in range(arrays[name].ndim)]
            arrays[name] = jnp.where(stays.reshape(shape), arrays[name], 0)
    return counting(graph, found, kept).replace(weights=Weights(arrays))


def counting(graph: Graph, found: Groups, kept: dict[int, np.ndarray]) -> Graph:
    """Divides sums over the last axis by the number of terms that are kept, where they are divided by that of all."""
    made = ir.producers(graph.jaxpr.eqns)

    def producer(atom: object) -> ir.JaxprEqn | None:
        return made.get(atom) if isinstance(atom, ir.Var) else None

    def rule(eqn: ir.JaxprEqn, operands: list) -> list | None:
        source = producer(eqn.invars[0]) if eqn.primitive.name == "div" else None
        while source is not None and source.primitive.name in ("broadcast_in_dim", "reshape"):
            source = producer(source.invars[0])
        if source is None or source.primitive.name != "reduce_sum" or not isinstance(eqn.invars[1], ir.Literal):
            return None
        summed = found.coupling.values[source.invars[0]].labels[-1]
        assert float(eqn.invars[1].val) == source.invars[0].aval.shape[-1]
        return [operands[0] / int(found.dims.size_of(summed, kept))]

    return graph.replace(jaxpr=ir.retrace(graph.jaxpr, rule))
