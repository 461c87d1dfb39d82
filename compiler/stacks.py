"""Weights of experts in one array or in many: apart for passes, which know each by its name, together when they run."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import grouped_sum
from xlathe.graph import Graph, Recipe
from xlathe.rewrite import Packed, Replacement, pack_inputs, rewrite_graph


@final
@dataclasses.dataclass(frozen=True)
class Stack:
    """Recipe of one array from several of one shape."""

    axis: int

    def __call__(self, weights: Iterable[Any]) -> tuple[np.ndarray]:
        return (np.stack(list(weights), self.axis),)


@final
@dataclasses.dataclass(frozen=True)
class Unstack:
    """Recipe of the arrays along the first axis of one."""

    def __call__(self, stacked: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(stacked))


def split_experts(graph: Graph) -> tuple[Graph, int]:
    """Returns the graph with a weight `w/3` for each expert of a `w` [experts, ...] that only multiplies groups of rows
    (`jax.lax.ragged_dot`), and how many experts that are."""
    consumer = ir.consumers(ir.live_equations(graph.jaxpr))
    known = {item.name for item in graph.inputs}
    packed = {}
    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        uses = consumer.get(var, [])
        by_expert = all(grouped_sum(eqn) and eqn.invars[1] is var for eqn in uses)
        if item.kind != "weight" or not uses or not by_expert:
            continue
        count, *shape = var.aval.shape
        parts = {f"{item.name}/{i}": jax.ShapeDtypeStruct(tuple(shape), var.aval.dtype) for i in range(count)}
        if not known & set(parts):
            packed[item.name] = Packed(parts, Unstack(), lambda *experts: jnp.stack(experts))
    return (pack_inputs(graph, packed) if packed else graph), sum(len(form.parts) for form in packed.values())


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
