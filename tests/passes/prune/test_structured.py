"""The shrunk graph equals the whole graph with the pruned weights set to zero, in every decoder of the zoo."""

import re
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from tests.passes.decoding import difference, fused
from tests.variants import DECODERS, Variant
from xlathe.coupling import couple, separate
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Weights
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.prune import PrunePlan, PruneStructured, prune
from xlathe.passes.prune.cost import cost
from xlathe.passes.prune.groups import Groups
from xlathe.passes.quantize import Quantize
from xlathe.pipeline import Context

WITHOUT_HEADS = {  # what numbers or selects the heads, by decoder: a barrier that is named
    name: reason
    for names, reason in (
        (["alibi_distance", "alibi_keys", "alibi_from_the_end"], "iota numbers it"),
        (["multi_query"], "no"),
    )
    for name in names
}


def masked(graph: Graph, plan: PrunePlan) -> Graph:
    """Sets every weight of the graph to zero where an index is concerned that the plan removes."""
    found = Groups(graph)
    arrays = {name: jnp.asarray(graph.weights[name]) for name in graph.names("weight", "const")}
    atoms = {tuple(axes): atom for atom, axes in found.axes.items() if atom in found.kinds}
    for group in plan.groups:
        for name, axis in group.axes:
            owner = found.dims.index(found.label(name, axis), atoms[group.axes])
            stays = (owner < 0) | np.isin(owner, group.kept)
            shape = [-1 if i == axis else 1 for i in range(arrays[name].ndim)]
            arrays[name] = jnp.where(stays.reshape(shape), arrays[name], 0)
    return graph.replace(weights=Weights(arrays))


@pytest.mark.parametrize("variant", DECODERS, ids=str)
def test_equals_the_masked_graph(variant: Variant) -> None:
    graph = separate(fused(variant))
    plan = PruneStructured(heads=0.5, neurons=0.5).make_plan(graph, Context())
    small = prune(graph, plan)
    assert plan.groups and all(0 < len(g.kept) < g.size for g in plan.groups)
    tokens = np.random.default_rng(0).integers(0, variant.vocab, (2, 9))
    assert difference(small(tokens), masked(graph, plan)(tokens)) <= variant.rtol
    assert plan.after == cost(small, couple(small), {})
    assert plan.after.parameters == sum(np.size(small.weights[n]) for n in small.names("weight"))
    assert plan.before == cost(graph, couple(graph), {})
