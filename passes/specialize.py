"""Put numbers in place of symbolic sizes."""

import dataclasses
from typing import Any, ClassVar, final

import jax

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.graph import Graph, Record
from xlathe.ops import OPS
from xlathe.pipeline import EXACT, Context, Keeps, Pass


@final
@dataclasses.dataclass(frozen=True)
class Specialize(Pass):
    """Fixes sizes, and inlines regions with a custom derivative: the result is for serving.

    batch and length: the axes b and t of a forward graph. tokens, selected, rows and slots: n, m, r and s of a step
    graph. pages and row_pages: p and c of a paged cache, pages in a pool and pages of a row. A size of 0 is left
    symbolic. Raises OptionError for a size that the graph has not.
    """

    keeps: ClassVar[Keeps] = EXACT

    batch: int = 0
    length: int = 0
    tokens: int = 0
    selected: int = 0
    rows: int = 0
    slots: int = 0
    pages: int = 0
    row_pages: int = 0

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        given = {
            "b": self.batch,
            "t": self.length,
            "n": self.tokens,
            "m": self.selected,
            "r": self.rows,
            "s": self.slots,
            "p": self.pages,
            "c": self.row_pages,
        }
        sizes: dict[str, Any] = {name: size for name, size in given.items() if size}
        scope = _symbols(graph.jaxpr)
        if unknown := sizes.keys() - scope.keys():
            raise OptionError(f"specialize: the graph has no size {sorted(unknown)}; it has {sorted(scope)}")
        everything = scope | sizes
        avals = [
            jax.ShapeDtypeStruct(ir.substitute(tuple(v.aval.shape), everything), v.aval.dtype)
            for v in graph.jaxpr.invars
        ]
        jaxpr = ir.trace(lambda *xs: ir.evaluate_at(graph.jaxpr, xs, everything, _bind_anew), *avals)
        return graph.replace(jaxpr=jaxpr), Record("specialize", notes=(str(sizes),))


def _bind_anew(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Traces an operation's body at its new sizes: with numbers put in, a body is not recognized any more."""
    operation = next((o for o in OPS if o.recognizes(eqn)), None)
    return None if operation is None else [operation(*operands, **ir.attributes(eqn))]


def _symbols(jaxpr: ir.Jaxpr) -> dict[str, Any]:
    """Returns the symbolic sizes of a graph's inputs by name."""
    dims = [d for v in jaxpr.invars for d in v.aval.shape]
    names = {name for d in dims for name in ir.dim_vars(d)}
    return {name: next(s for d in dims if (s := ir.dim_symbol(d, name)) is not None) for name in sorted(names)}


def is_specialized(graph: Graph) -> str | None:
    """All sizes of the graph are numbers."""
    symbols = _symbols(graph.jaxpr)
    return f"a graph without symbolic sizes (it has {', '.join(symbols)}; run Specialize)" if symbols else None
