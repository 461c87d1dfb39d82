"""Products with weights, and look-ups of their rows, become those of quantized ones."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.graph import Graph
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.passes.quantize.experts import Experts, emit_product
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Layout, Uses
from xlathe.rewrite import Replacement, rewrite_graph
from xlathe.storage import take_lines


@dataclasses.dataclass(frozen=True)
class Replaced:
    """The inputs that stand for a weight; or, stacked, for those of experts, each of which is a line of every part."""

    weights: tuple[str, ...]
    parts: tuple[str, ...]
    stacked: bool = False


def replace_products(
    graph: Graph, chosen: Mapping[str, tuple[Scheme, Layout]], experts: Sequence[Experts]
) -> tuple[Graph, list[Replaced]]:
    """Returns the graph with the parts of weights as inputs in place of the weights.

    chosen: weights by name, which `plan_weights` or `find_experts` found; experts: those among them that are multiplied
    at once. The graph's weights are as they were: the caller says what the parts are.
    """
    finder, replacements = Uses(graph), {}
    added: dict[str, jax.ShapeDtypeStruct] = {}
    replaced = []
    in_groups = {name for group in experts for name in group.names}
    for name, (scheme, layout) in chosen.items():
        if name in in_groups:
            continue
        stored = scheme.parts(*layout.shape(graph.aval(name)))
        made = {f"{name}.{part}": jax.ShapeDtypeStruct(p.shape, p.dtype) for part, p in stored.items()}
        for use in finder.of(name)[1]:
            emit = _product(use.eqn, use.side, scheme) if use.is_product else _lookup(use.eqn, scheme)
            other = use.eqn.invars[1 - use.side]
            replacements[use.eqn.outvars[0]] = Replacement((other,), emit, added=tuple(made))
        added |= made
        replaced.append(Replaced((name,), tuple(made)))
    for group in experts:
        scheme = chosen[group.names[0]][0]
        made = _stacked(graph, group, scheme)
        emit = emit_product(group.eqn, scheme.attributes())
        replacements[group.eqn.outvars[0]] = Replacement((group.rows, group.sizes), emit, added=tuple(made))
        added |= made
        replaced.append(Replaced(group.names, tuple(made), stacked=True))
    return rewrite_graph(graph, replacements, added), replaced


def _stacked(graph: Graph, group: Experts, scheme: Scheme) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the inputs that replace the matrices of experts."""
    parts = scheme.parts(*group.layout.shape(graph.aval(group.names[0])))
    count = len(group.names)
    return {f"{group.stem}.{part}": jax.ShapeDtypeStruct((count, *p.shape), p.dtype) for part, p in parts.items()}


def _product(eqn: ir.JaxprEqn, side: int, scheme: Scheme) -> Any:
    """Emits the product of the other operand with a quantized weight, in the result's own layout."""
    einsum = Einsum.of(eqn)
    other, weight = eqn.invars[1 - side].aval, eqn.invars[side].aval
    summed = sorted(pair[1 - side] for pair in einsum.contracted)
    kept = [i for i in range(other.ndim) if i not in summed]
    weight_summed = {pair[side] for pair in einsum.contracted}
    channels = [n for i, n in enumerate(weight.shape) if i not in weight_summed]
    out_dtype = str(eqn.outvars[0].aval.dtype)

    def emit(x: jax.Array, *parts: jax.Array) -> jax.Array:
        width = math.prod(x.shape[i] for i in summed)
        rows = jnp.transpose(x, (*kept, *summed)).reshape(*(x.shape[i] for i in kept), width)
        y = quantized_dot(rows, *parts, out_dtype=out_dtype, **scheme.attributes())
        y = y.reshape(*y.shape[:-1], *channels)
        return y if side == 1 else jnp.moveaxis(y, range(len(kept)), range(-len(kept), 0))

    return emit


def _lookup(eqn: ir.JaxprEqn, scheme: Scheme) -> Any:
    """Emits the look-up of quantized rows; only these are dequantized."""

    def emit(index: jax.Array, *parts: jax.Array) -> jax.Array:
        rows = scheme.stored.decode(*take_lines(scheme.stored, index[..., 0], *parts))
        return rows.astype(eqn.outvars[0].aval.dtype)

    return emit
