"""The weights of experts: found where a graph multiplies groups of rows with a stack of them, quantized one by one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import grouped_sum
from xlathe.graph import Graph
from xlathe.ops.quantized_ragged_dot import quantized_ragged_dot
from xlathe.passes.quantize.uses import Layout
from xlathe.stacks import stem


@dataclasses.dataclass(frozen=True)
class Experts:
    """Weights by expert, which `jax.lax.ragged_dot` multiplies groups of rows with.

    names: the matrix of each expert. eqn: the product. layout: of every matrix. The rows of an expert are as many as
    `sizes` says, one group after the other.
    """

    names: tuple[str, ...]
    eqn: ir.JaxprEqn
    layout: Layout

    @property
    def rows(self) -> ir.Var:
        """[m, k]."""
        return self.eqn.invars[0]

    @property
    def sizes(self) -> ir.Var:
        """int32 [experts]."""
        return self.eqn.invars[2]

    @property
    def stem(self) -> str:
        """What the inputs that replace the matrices are called after: `layers/3/experts/*/gate/kernel`."""
        return stem(self.names) or self.names[0]


def find_experts(graph: Graph, wanted: Mapping[str, Any]) -> tuple[list[Experts], tuple[str, ...]]:
    """Returns the stacks of experts whose matrices all have a name in `wanted`, with equal values, and why others
    cannot be quantized."""
    equations = ir.live_equations(graph.jaxpr)
    producer, consumer = ir.producers(equations), ir.consumers(equations)
    inputs = {v: i.name for v, i in zip(graph.jaxpr.invars, graph.inputs, strict=True) if i.kind == "weight"}
    found, misses = [], []
    for eqn in equations:
        summed = grouped_sum(eqn)
        if summed is None:
            continue
        stack = producer.get(eqn.invars[1])
        if stack is None or stack.primitive.name != "stack" or not all(a in inputs for a in stack.invars):
            continue
        members = tuple(inputs[a] for a in stack.invars)
        chosen = [name for name in members if name in wanted]
        used_once = all(len(consumer[v]) == 1 for v in (*stack.invars, stack.outvars[0]))
        if stem(members) is None or stack.params["axis"] != 0 or not used_once:
            misses += [f"{members[0]}: the experts beside it are used in other ways too at {ir.source_line(stack)}"]
        elif len(chosen) == len(members) and len({wanted[name] for name in members}) > 1:
            misses.append(f"{members[0]}: rules give different schemes to the experts that are multiplied at once")
        elif len(chosen) == len(members):
            found.append(Experts(members, eqn, Layout((2 - summed,), (summed - 1,))))
        elif chosen:
            misses += [f"{chosen[0]}: only {len(chosen)} of the {len(members)} experts that are multiplied at once"]
    return found, tuple(misses)


def emit_product(eqn: ir.JaxprEqn, attributes: Any) -> Callable[..., jax.Array]:
    """Emits the product of groups of rows with quantized experts: (rows, sizes, *parts)."""
    out_dtype = str(eqn.outvars[0].aval.dtype)

    def emit(rows: jax.Array, sizes: jax.Array, *parts: jax.Array) -> jax.Array:
        return quantized_ragged_dot(rows, sizes.astype(jnp.int32), *parts, out_dtype=out_dtype, **attributes)

    return emit
