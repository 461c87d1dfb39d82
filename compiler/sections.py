"""Cut points of a model: values through which everything that depends on the tokens flows."""

from xlathe import jaxpr as ir
from xlathe.graph import Graph


def cut_points(graph: Graph) -> list[ir.Var]:
    """Returns the values [b, t, width] that alone carry the tokens from the equations before to those after them.

    The residual stream between two sub-layers is one, also where a norm comes last.
    """
    equations = ir.live_equations(graph.jaxpr)
    last_use = {a: i for i, eqn in enumerate(equations) for a in eqn.invars if isinstance(a, ir.Var)}
    last_use |= {a: len(equations) for a in graph.jaxpr.outvars if isinstance(a, ir.Var)}
    args = {v for v, i in zip(graph.jaxpr.invars, graph.inputs, strict=True) if i.kind == "arg"}
    alive = set(args)
    cuts: list[ir.Var] = []
    for i, eqn in enumerate(equations):
        if any(isinstance(a, ir.Var) and a in alive for a in eqn.invars):
            alive.update(out for out in eqn.outvars if out in last_use)
        alive = {v for v in alive if last_use.get(v, -1) > i}
        if len(alive) == 1 and next(iter(alive)).aval.ndim == 3 and next(iter(alive)) not in cuts:
            cuts += alive
    return cuts


def layers(graph: Graph) -> list[tuple[ir.Var, ir.Var]]:
    """Returns (input, output) of each repeated block, found by the attention in it; empty where they are not alike.

    A layer begins at the last cut before its attention and ends where the next one begins. The last one ends after
    as many cuts as the one before it.
    """
    cuts = cut_points(graph)
    order = {out: i for i, eqn in enumerate(graph.jaxpr.eqns) for out in eqn.outvars}
    attentions = [i for i, eqn in enumerate(graph.jaxpr.eqns) if ir.is_op(eqn, "attention")]
    starts = list(dict.fromkeys(max((n for n, c in enumerate(cuts) if order[c] < at), default=-1) for at in attentions))
    if len(starts) < 2 or starts[0] < 0:
        return []
    ends = [*starts[1:], starts[-1] + starts[-1] - starts[-2]]
    if ends[-1] >= len(cuts):
        return []
    found = [(cuts[start], cuts[end]) for start, end in zip(starts, ends, strict=True)]
    alike = all(str(a.aval) == str(b.aval) for a, b in found)
    return found if alike else []
