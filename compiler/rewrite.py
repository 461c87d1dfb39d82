"""Replace values of a jaxpr by newly traced computations."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xlathe import jaxpr as ir
from xlathe.graph import Graph, Input, Recipe


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A new way to compute a value: `emit(*values of inputs)`; the inputs come before it in the program.

    source: the equation whose line the new ones get; the replaced one's by default. added: names of inputs that are
    added to the program and follow the other ones.
    """

    inputs: tuple[ir.Var, ...]
    emit: Callable[..., Any]
    source: ir.JaxprEqn | None = None
    added: tuple[str, ...] = ()


def rewrite(
    jaxpr: ir.Jaxpr, replacements: Mapping[ir.Var, Replacement], added: Mapping[str, Any] | None = None
) -> ir.Jaxpr:
    """Traces `jaxpr` again with some values computed another way; what only the old way needed is gone.

    added: avals of further inputs, by the name that replacements know them by; they come last.
    Raises TypeError where a replacement has another shape or dtype than the value that it stands for.
    """
    live = _live(jaxpr, replacements)
    count, new = len(jaxpr.invars), added or {}

    def rewritten(*operands: Any) -> list[Any]:
        env: dict[ir.Var, Any] = dict(zip(jaxpr.invars, operands[:count], strict=True))
        more = dict(zip(new, operands[count:], strict=True))

        def read(atom: ir.Atom) -> Any:
            return atom.val if isinstance(atom, ir.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            for out in eqn.outvars:
                if out in live and out in replacements:
                    with ir.at_source_of(replacements[out].source or eqn):
                        env[out] = _emit(out, replacements[out], read, more)
            with ir.at_source_of(eqn):
                if any(out in live and out not in env for out in eqn.outvars):
                    for out, value in zip(eqn.outvars, ir.bind(eqn, [read(a) for a in eqn.invars]), strict=True):
                        env.setdefault(out, value)
        return [read(atom) for atom in jaxpr.outvars]

    return ir.trace(rewritten, *(v.aval for v in jaxpr.invars), *new.values())


def rewrite_graph(
    graph: Graph, replacements: Mapping[ir.Var, Replacement], added: Mapping[str, Any] | None = None
) -> Graph:
    """As `rewrite`; added: weights that the graph gets, for which the caller leaves recipes. Dead inputs are gone."""
    new = added or {}
    inputs = (*graph.inputs, *(Input(name, "weight") for name in new))
    return drop_dead_inputs(graph, rewrite(graph.jaxpr, replacements, new), inputs)


def drop_dead_inputs(graph: Graph, jaxpr: ir.Jaxpr, inputs: Sequence[Input]) -> Graph:
    """Returns the graph with another program and its inputs, but for weights and constants that nothing reads."""
    live, kept = ir.drop_dead(jaxpr, keep=lambda i: inputs[i].kind in ("arg", "state"))
    return graph.replace(jaxpr=live, inputs=tuple(inputs[i] for i in kept))


def _emit(out: ir.Var, replacement: Replacement, read: Callable[[ir.Atom], Any], added: Mapping[str, Any]) -> Any:
    value = replacement.emit(*(read(v) for v in replacement.inputs), *(added[name] for name in replacement.added))
    if value.shape != out.aval.shape or value.dtype != out.aval.dtype:
        raise TypeError(f"replacement is {value.dtype}{value.shape}, the value is {out.aval}")
    return value


def _live(jaxpr: ir.Jaxpr, replacements: Mapping[ir.Var, Replacement]) -> set[ir.Var]:
    producer = ir.producers(jaxpr.eqns)
    live: set[ir.Var] = set()
    stack = [a for a in jaxpr.outvars if isinstance(a, ir.Var)]
    while stack:
        value = stack.pop()
        if value in live:
            continue
        live.add(value)
        if value in replacements:
            stack.extend(replacements[value].inputs)
        elif value in producer:
            stack.extend(a for a in producer[value].invars if isinstance(a, ir.Var))
    return live


@dataclasses.dataclass(frozen=True)
class Packed:
    """Another form of a weight: stored as `parts`, made by `pack`, and turned back inside the graph by `unpack`.

    parts: name of the new input -> aval. pack: weight -> one array a part. unpack: parts -> weight.
    """

    parts: Mapping[str, Any]
    pack: Callable[[Any], tuple[Any, ...]]
    unpack: Callable[..., Any]


def pack_inputs(graph: Graph, packed: Mapping[str, Packed]) -> Graph:
    """Replaces weights by their parts as inputs, and leaves the recipes that make them."""
    inputs: list[Input] = []
    avals: list[Any] = []
    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        parts = packed[item.name].parts if item.name in packed else {}
        inputs += [Input(part, item.kind) for part in parts] or [item]
        avals += list(parts.values()) or [var.aval]

    def unpacked(*operands: Any) -> list[Any]:
        left = iter(operands)
        values = []
        for item in graph.inputs:
            form = packed.get(item.name)
            values.append(form.unpack(*(next(left) for _ in form.parts)) if form else next(left))
        return ir.evaluate(graph.jaxpr, values)

    recipes = [Recipe(name, tuple(form.parts), form.pack) for name, form in packed.items()]
    return graph.replace(
        jaxpr=ir.trace(unpacked, *avals), inputs=tuple(inputs), weights=graph.weights.derive(*recipes)
    )
