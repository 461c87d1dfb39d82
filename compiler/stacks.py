"""Weights that a model stacks when it runs: stacked once, before it runs, where that is all that is done with them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np

from xlathe import jaxpr as ir
from xlathe.graph import Graph, Recipe
from xlathe.rewrite import Replacement, rewrite_graph


@final
@dataclasses.dataclass(frozen=True)
class Stack:
    """Recipe of one array from several of one shape."""

    axis: int

    def __call__(self, weights: Iterable[Any]) -> tuple[np.ndarray]:
        return (np.stack(list(weights), self.axis),)


def stem(names: Sequence[str]) -> str | None:
    """Returns what names have in common, `layers/3/experts/*/gate/kernel`; None where they differ in their lengths."""
    parts = [name.split("/") for name in names]
    if len(set(map(len, parts))) > 1:
        return None
    return "/".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def stack_weights(graph: Graph) -> Graph:
    """Returns the graph with one input for weights that are stacked, such as those of experts, and not used else."""
    equations = ir.live_equations(graph.jaxpr)
    consumer = ir.consumers(equations)
    weights = {v: i.name for v, i in zip(graph.jaxpr.invars, graph.inputs, strict=True) if i.kind == "weight"}
    replacements: dict[ir.Var, Replacement] = {}
    added: dict[str, Any] = {}
    recipes: list[Recipe] = []
    for eqn in equations:
        stacked = eqn.primitive.name == "stack" and all(a in weights and len(consumer[a]) == 1 for a in eqn.invars)
        names = tuple(weights[a] for a in eqn.invars) if stacked else ()
        name = stem(names) if names else None
        if name is None or name in {*weights.values(), *added}:
            continue
        (out,) = eqn.outvars
        replacements[out] = Replacement((), lambda stack: stack, added=(name,))
        added[name] = out.aval
        recipes.append(Recipe(names[0], (name,), Stack(eqn.params["axis"]), names[1:]))
    if not replacements:
        return graph
    return rewrite_graph(graph, replacements, added).replace(weights=graph.weights.derive(*recipes))
