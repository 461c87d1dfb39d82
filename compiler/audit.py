"""Prove from a graph that everything outside attention treats each token on its own.

Every value gets a layout: which of its axes hold the batch (`b`) and the tokens (`t`), also inside merged axes. A
rule for each primitive carries layouts from operands to results (`layout_rules`, and `dispatch` for routing to
experts); an operation on tokens that would mix them, or for which no rule exists, is refused by name and source line.
"""

from collections.abc import Sequence

from xlathe import jaxpr as ir
from xlathe.dispatch import Dispatch
from xlathe.errors import DeriveError
from xlathe.graph import Graph
from xlathe.layout_rules import carry
from xlathe.layouts import Layout, Mixes, by_shape


def layouts_of(graph: Graph) -> dict[ir.Var, Layout]:
    """Returns the layout of every live value of a forward graph; raises as `find_layouts` does."""
    if others := [name for name in graph.names("arg") if name != "tokens"]:
        raise DeriveError(f"no incremental step: the graph takes {', '.join(others)} beside tokens; only a decoder of "
                          "tokens alone has one")  # fmt: skip
    (tokens,) = (v for v, i in zip(graph.jaxpr.invars, graph.inputs, strict=True) if i.kind == "arg")
    misses = [m for record in graph.history for m in record.misses if record.name == "fuse_attention"]
    return find_layouts(graph.jaxpr, tokens, misses)


def find_layouts(jaxpr: ir.Jaxpr, tokens: ir.Var, near_misses: Sequence[str] = ()) -> dict[ir.Var, Layout]:
    """Returns the layout of every live value.

    near_misses: why softmaxes of the graph were not recognized as attention, for the error.
    Raises DeriveError, naming operation and line, at the first operation that mixes tokens or rows.
    """
    layouts = {var: Layout(by_shape(var.aval.shape), var is tokens) for var in jaxpr.invars}
    dispatch = Dispatch(jaxpr)
    for eqn in ir.live_equations(jaxpr):
        operands = [layouts[a] if isinstance(a, ir.Var) else Layout(by_shape(a.aval.shape), False) for a in eqn.invars]
        of_tokens = any(operand.of_tokens for operand in operands)
        try:
            results = dispatch(eqn, operands) if of_tokens else [Layout(axes, False) for axes in carry(eqn, operands)]
        except Mixes as mixes:
            if of_tokens:
                raise _refusal(eqn, mixes, near_misses) from None
            # what only positions mix is no loss yet
            results = [Layout(by_shape(out.aval.shape), False) for out in eqn.outvars]
        layouts.update(zip(eqn.outvars, results, strict=True))
    return layouts


def _refusal(eqn: ir.JaxprEqn, mixes: Mixes, near_misses: Sequence[str]) -> DeriveError:
    name = eqn.primitive.name.removeprefix(ir.OP_PREFIX)
    reasons = [f"not attention: {miss}" for miss in near_misses] if name == "dot_general" else []
    return DeriveError("; ".join([f"no incremental step: {name} {mixes} at {ir.source_line(eqn)}", *reasons]))
