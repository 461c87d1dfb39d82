"""Replace values of a jaxpr by newly traced computations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from xlathe import jaxpr as ir


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A new way to compute a value: `emit(*values of inputs)`; the inputs come before it in the program.

    source: the equation whose line the new ones get; the replaced one's by default.
    """

    inputs: tuple[ir.Var, ...]
    emit: Callable[..., Any]
    source: ir.JaxprEqn | None = None


def rewrite(jaxpr: ir.Jaxpr, replacements: Mapping[ir.Var, Replacement]) -> ir.Jaxpr:
    """Traces `jaxpr` again with some values computed another way; what only the old way needed is gone.

    Raises TypeError where a replacement has another shape or dtype than the value that it stands for.
    """
    live = _live(jaxpr, replacements)

    def rewritten(*operands: Any) -> list[Any]:
        env: dict[ir.Var, Any] = dict(zip(jaxpr.invars, operands, strict=True))

        def read(atom: ir.Atom) -> Any:
            return atom.val if isinstance(atom, ir.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            for out in eqn.outvars:
                if out in live and out in replacements:
                    with ir.at_source_of(replacements[out].source or eqn):
                        env[out] = _emit(out, replacements[out], read)
            with ir.at_source_of(eqn):
                if any(out in live and out not in env for out in eqn.outvars):
                    for out, value in zip(eqn.outvars, ir.bind(eqn, [read(a) for a in eqn.invars]), strict=True):
                        env.setdefault(out, value)
        return [read(atom) for atom in jaxpr.outvars]

    return ir.trace(rewritten, *(v.aval for v in jaxpr.invars))


def _emit(out: ir.Var, replacement: Replacement, read: Callable[[ir.Atom], Any]) -> Any:
    value = replacement.emit(*(read(v) for v in replacement.inputs))
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
