"""A graph's size and history as text."""

import io
import math
from collections.abc import Iterator

import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from xlathe.graph import Graph, Record

_NEAR_MISSES = 3  # a rule


def describe(graph: Graph) -> str:
    """Returns parameters, megabytes (10^6 bytes), bits a weight, and what each pass did, as plain text."""
    kind = "step" if graph.is_step else "forward"
    parameters, stored = count_parameters(graph), weight_bytes(graph)
    bits = 8 * stored / parameters if parameters else math.nan
    constants = sum(_bytes(graph, name) for name in graph.names("const"))
    lines = [
        f"{kind} graph, {len(graph.jaxpr.eqns)} equations, max_len {graph.max_len}, vocabulary {graph.vocab}",
        f"{parameters:,} parameters, {stored / 1e6:,.2f} MB of weights, {bits:.2f} bits a weight, "
        f"{constants / 1e6:,.2f} MB of constants",
    ]
    if graph.history:
        lines += ["", _table(graph.history)]
        lines += [f"{record.name}: {remark}" for record in graph.history for remark in _remarks(record)]
    return "\n".join(lines)


def count_parameters(graph: Graph) -> int:
    """Returns the number of trained numbers in the weights as they were before any recipe replaced them."""
    return sum(math.prod(origin.shape) for origin in graph.origins)


def weight_bytes(graph: Graph) -> int:
    """Returns the bytes of all inputs of kind weight, scales included."""
    return sum(_bytes(graph, name) for name in graph.names("weight"))


def _bytes(graph: Graph, name: str) -> int:
    aval = graph.aval(name)
    return math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize


def _table(history: tuple[Record, ...]) -> str:
    table = Table("pass", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("seconds", "equations"):
        table.add_column(heading, justify="right")
    table.add_column("hits")
    for record in history:
        hits = ", ".join(f"{count} {rule}" for rule, count in record.hits.items())
        before, after = record.equations
        table.add_row(record.name, f"{record.seconds:.2f}", f"{before} -> {after}", hits)
    console = Console(file=io.StringIO(), width=200, color_system=None, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _remarks(record: Record) -> Iterator[str]:
    yield from record.notes
    yield from (f"nearly: {miss}" for miss in record.misses[:_NEAR_MISSES])
    if len(record.misses) > _NEAR_MISSES:
        yield f"and {len(record.misses) - _NEAR_MISSES} more near misses"
