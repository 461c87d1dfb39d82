"""Bring a traced graph into the plain form that the other passes read."""

import dataclasses
from typing import Any, ClassVar, final

from xlathe import jaxpr as ir
from xlathe.graph import Graph, Record
from xlathe.narrow import narrow
from xlathe.own_entries import pair_own_entries
from xlathe.pipeline import EXACT, Context, Keeps, Pass
from xlathe.rewrite import drop_dead_inputs
from xlathe.stacks import split_experts


@final
@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    """Inlines calls, computes before spreading, merges equal equations and removes dead ones.

    Experts that lie in one array become weights of their own, so that each has its name and its statistics; they are
    put together again when a program is compiled.

    Look-ups in which rows or tokens read their own entries get paired axes instead of counting indices.

    Regions with a custom derivative stay, unless they move or reduce axes: attention must be readable through them.
    """

    keeps: ClassVar[Keeps] = EXACT

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        inlined = ir.inline_calls(graph.jaxpr, _is_inlined)
        paired, own = pair_own_entries(narrow(inlined))
        merged, count = merge_equal(paired)
        split, experts = split_experts(drop_dead_inputs(graph, merged, graph.inputs))
        hits = {"merged": count} | {k: n for k, n in (("own_entries", own), ("experts", experts)) if n}
        return split, Record("canonicalize", hits=hits)


def _is_inlined(eqn: ir.JaxprEqn) -> bool:
    if eqn.primitive.name in ir.INLINED:
        return True
    return eqn.primitive.name in ir.CUSTOM_DERIVATIVE and not is_elementwise_region(eqn)


def is_elementwise_region(eqn: ir.JaxprEqn) -> bool:
    """Says whether a call keeps every axis in place: all its values have the result's shape or are scalars."""
    body = ir.call_body(eqn)
    if body is None:
        return False
    shape = eqn.outvars[0].aval.shape
    inner = [e for e in body.eqns if e.primitive.name not in ir.INLINED]
    nested = [e for e in body.eqns if e.primitive.name in ir.INLINED]
    shapes = {out.aval.shape for e in inner for out in e.outvars}
    return shapes <= {shape, ()} and all(is_elementwise_region(e) for e in nested)


def merge_equal(jaxpr: ir.Jaxpr) -> tuple[ir.Jaxpr, int]:
    """Computes equal equations once; returns the jaxpr and how many were merged."""
    seen: dict[Any, list[Any]] = {}
    merged = 0

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any]:
        nonlocal merged
        key = _key(eqn, operands)
        if key is None:
            return ir.bind(eqn, operands)
        if key in seen:
            merged += 1
        else:
            # operands are kept alive with the results, so that their ids stay theirs
            seen[key] = [ir.bind(eqn, operands), operands]
        return list(seen[key][0])

    return ir.retrace(jaxpr, rule), merged


def _key(eqn: ir.JaxprEqn, operands: list[Any]) -> Any:
    """A key that equal equations share; None for those with effects or regions."""
    if eqn.effects or ir.call_body(eqn) is not None or any(isinstance(p, ir.Jaxpr) for p in eqn.params.values()):
        return None
    ids = tuple(
        (str(a.val), str(a.aval)) if isinstance(a, ir.Literal) else id(x)
        for a, x in zip(eqn.invars, operands, strict=True)
    )
    return eqn.primitive.name, ids, str(sorted(eqn.params.items(), key=lambda item: item[0]))
