"""Choose how a derived cache is kept: one slot a position, a ring, or pages of a pool; as it is, or in 8 bits.

The step graph is evaluated with each remembered value as one object, its arrays and how they are kept, that flows from
the state through `write_slots` into `cached_attention`; at the outputs the arrays come apart again.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final, get_args

import jax
import jax.numpy as jnp
from jax import export

from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Input, Record
from xlathe.integers import as_integer
from xlathe.ops.cached_attention import cached_attention
from xlathe.ops.write_slots import quantize_heads, write_slots
from xlathe.pipeline import APPROXIMATE, REASSOCIATED, Context, Keeps, Pass, is_step
from xlathe.step import TABLE, state_bytes

Layout = Literal["contiguous", "ring", "paged"]


def is_as_derived(graph: Graph) -> str | None:
    """The step has symbolic sizes and its cache is kept as `KVCache` derived it."""
    writes = [e for e in graph.jaxpr.eqns if ir.is_op(e, "write_slots")]
    if any(e.params.get("layout") for e in writes) or any(".codes" in name for name in graph.names("state")):
        return "a cache as KVCache derived it, but this one was laid out before"
    fixed = writes and not all(map(ir.is_symbolic, writes[0].outvars[0].aval.shape[:2]))
    return "a step whose sizes are symbolic (run CacheLayout before Specialize)" if fixed else None


@final
@dataclasses.dataclass(frozen=True)
class CacheLayout(Pass):
    """Changes how the cache of a step graph is kept, never what is remembered; see `xlathe.ops.write_slots`.

    layout: `contiguous`; `ring`, for attention that sees exactly a window, window + slack slots a row, while other
    attention stays contiguous; or `paged`, pools [p, page, ...] and one more state, the table int32 [r, c] of all
    caches. page: tokens of a page. slack: the most tokens of one row that a call may bring: a chunk of a prompt, or
    the drafts and the token before them. dtype: `int8` keeps codes and one float32 scale a token and head, None what
    the model computes; a token is read as it is kept, in the call that writes it too.

    Raises OptionError for other values, and for a page that does not divide the graph's max_len.
    """

    needs = (is_step, is_as_derived)
    gives = (is_step,)

    layout: Layout = "contiguous"
    page: int = 16
    slack: int = 128
    dtype: Literal["int8"] | None = None

    @property
    def keeps(self) -> Keeps:  # type: ignore[override]
        return APPROXIMATE if self.dtype else REASSOCIATED

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise OptionError(f"cache_layout: layout must be one of {get_args(Layout)}, got {self.layout!r}")
        if self.dtype not in (None, "int8"):
            raise OptionError(f"cache_layout: dtype must be 'int8' or None, got {self.dtype!r}")
        for name, size in (("page", self.page), ("slack", self.slack)):
            if (as_integer(size) or 0) < 1:
                raise OptionError(f"cache_layout: {name} must be an integer of at least 1, got {size!r}")

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        names = graph.names("state")
        if self.layout == "paged" and graph.max_len % self.page:
            raise OptionError(f"cache_layout: page={self.page} does not divide max_len={graph.max_len}")
        live, _ = ir.drop_dead(graph.jaxpr, keep=lambda _: True)
        graph = graph.replace(jaxpr=live)
        rings, misses = _find_rings(graph, self.slack) if self.layout == "ring" else ({}, ())
        other: Layout = "contiguous" if self.layout == "ring" else self.layout
        kept = {name: _Kept("ring" if name in rings else other, self.dtype == "int8") for name in names}
        result = _Layout(graph, kept, rings, self.page).applied() if names else graph
        hits = Counter[str](k.layout for k in kept.values())
        return result, Record("cache_layout", hits=hits, misses=misses, notes=(_sizes_note(result),))


@dataclasses.dataclass(frozen=True)
class _Kept:
    """How one remembered value is kept."""

    layout: Layout
    quantized: bool

    @property
    def attributes(self) -> dict[str, Any]:
        """Of an operation; defaults are left out, so that the program stays the one that KVCache derived."""
        return {} if self.layout == "contiguous" else {"layout": self.layout}

    def parts(self, name: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        """Returns the avals of the states that the value [..., k, d] is kept in."""
        if not self.quantized:
            return {name: jax.ShapeDtypeStruct(shape, dtype)}
        codes, scale = jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        return {f"{name}.codes": codes, f"{name}.scale": scale}


@dataclasses.dataclass(frozen=True)
class _Cache:
    """A remembered value while the step is traced."""

    kept: _Kept
    parts: tuple[jax.Array, ...]  # the value; or codes and scale
    table: tuple[jax.Array, ...]  # of a paged cache, else ()

    def write(self, new: jax.Array, rows: jax.Array, positions: jax.Array) -> "_Cache":
        parts = quantize_heads(new) if self.kept.quantized else (new,)
        written = (
            write_slots(old, part, rows, positions, *self.table, **self.kept.attributes)
            for old, part in zip(self.parts, parts, strict=True)
        )
        return dataclasses.replace(self, parts=tuple(written))

    def cast(self, dtype: Any) -> "_Cache":
        """Codes need no widening: they are multiplied as numbers of the query's dtype."""
        return self if self.kept.quantized else dataclasses.replace(self, parts=(self.parts[0].astype(dtype),))


def _attend(eqn: ir.JaxprEqn, operands: list[Any]) -> jax.Array:
    q, keys, values, rows, positions, *terms = operands
    attributes = ir.attributes(eqn) | keys.kept.attributes
    scales = []
    if keys.kept.quantized:
        attributes["quantized"] = True
        scales = [keys.parts[1], values.parts[1]]
    return cached_attention(
        q, keys.parts[0], values.parts[0], rows, positions, *terms, *scales, *keys.table, **attributes
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One rewriting of a step graph. rings: slots of the rings, by state."""

    graph: Graph
    kept: Mapping[str, _Kept]
    rings: Mapping[str, int]
    page: int

    def applied(self) -> Graph:
        sizes, pages = self._symbols()
        inputs: list[Input] = []
        avals: list[Any] = []
        for item, var in zip(self.graph.inputs, self.graph.jaxpr.invars, strict=True):
            parts = self._parts(item, var, sizes, pages)
            inputs += [Input(name, item.kind) for name in parts]
            avals += parts.values()
        if pages:
            inputs.append(Input(TABLE, "state"))
            avals.append(jax.ShapeDtypeStruct((sizes["r"], pages["c"]), jnp.int32))

        def step(*operands: Any) -> list[Any]:
            table = operands[-1:] if pages else ()
            values = list(self._gathered(iter(operands), table))
            logits, *caches = ir.evaluate_at(self.graph.jaxpr, values, sizes, _rule)
            return [logits, *(part for cache in caches for part in cache.parts), *table]

        return self.graph.replace(jaxpr=ir.trace(step, *avals), inputs=tuple(inputs))

    def _symbols(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what the sizes n, m, r and s become, and the sizes c and p of a paged cache."""
        longest = self.graph.max_len
        layouts = {kept.layout for kept in self.kept.values()}
        if layouts == {"paged"}:
            n, m, r, c, p = export.symbolic_shape("n, m, r, c, p", constraints=[f"{self.page}*c <= {longest}"])
            return {"n": n, "m": m, "r": r, "s": c * self.page}, {"c": c, "p": p}
        if layouts == {"ring"}:
            return dict(zip("nmr", export.symbolic_shape("n, m, r"), strict=True)), {}
        return dict(zip("nmrs", export.symbolic_shape("n, m, r, s", constraints=[f"s <= {longest}"]), strict=True)), {}

    def _parts(self, item: Input, var: ir.Var, sizes: Mapping[str, Any], pages: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs that stand for one, by name."""
        shape, dtype = tuple(var.aval.shape), var.aval.dtype
        if item.kind != "state":
            return {item.name: jax.ShapeDtypeStruct(ir.substitute(shape, sizes), dtype)}
        kept = self.kept[item.name]
        first = {
            "contiguous": lambda: (sizes["r"], sizes["s"]),
            "ring": lambda: (sizes["r"], self.rings[item.name]),
            "paged": lambda: (pages["p"], self.page),
        }[kept.layout]()
        return kept.parts(item.name, (*first, *shape[2:]), dtype)

    def _gathered(self, operands: Iterator[Any], table: tuple[Any, ...]) -> Iterator[Any]:
        """Yields what the graph takes: a cache for each of its states."""
        for item in self.graph.inputs:
            if item.kind != "state":
                yield next(operands)
                continue
            kept = self.kept[item.name]
            yield _Cache(kept, tuple(next(operands) for _ in range(2 if kept.quantized else 1)), table)


def _rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    if not any(isinstance(operand, _Cache) for operand in operands):
        return None
    if ir.is_op(eqn, "write_slots"):
        return [operands[0].write(*operands[1:])]
    if ir.is_op(eqn, "cached_attention"):
        return [_attend(eqn, operands)]
    if eqn.primitive.name == "convert_element_type":
        return [operands[0].cast(eqn.params["new_dtype"])]
    raise PassError(f"cache_layout: {eqn.primitive.name} reads the cache at {ir.source_line(eqn)}")


def _find_rings(graph: Graph, slack: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the slots of each state that can be a ring, and why attentions stay contiguous.

    Attentions that share a remembered value share how it is kept.
    """
    producer = ir.producers(graph.jaxpr.eqns)
    names = {v: i.name for v, i in zip(graph.jaxpr.invars, graph.inputs, strict=True)}
    groups: list[tuple[frozenset[str], list[ir.JaxprEqn]]] = []
    for eqn in graph.jaxpr.eqns:
        if ir.is_op(eqn, "cached_attention"):
            states = frozenset(names[_state_of(atom, producer)] for atom in eqn.invars[1:3])
            shared = [group for group in groups if group[0] & states]
            groups = [group for group in groups if not group[0] & states]
            merged = states.union(*(group[0] for group in shared))
            groups.append((merged, [eqn, *(e for group in shared for e in group[1])]))
    rings: dict[str, int] = {}
    misses: Counter[str] = Counter()
    for states, eqns in groups:
        reason = next(filter(None, (_no_ring(e, slack, graph.max_len) for e in eqns)), None)
        if reason is None:
            rings |= dict.fromkeys(states, slack + max(e.params["window"] for e in eqns))
        else:
            misses[reason] += len(eqns)
    return rings, tuple(f"{count} attentions stay contiguous: {reason}" for reason, count in misses.items())


def _no_ring(eqn: ir.JaxprEqn, slack: int, max_len: int) -> str | None:
    window = eqn.params["window"]
    if eqn.params["masked"] or eqn.params["biased"]:
        return "a mask or bias reads every position"
    if window is None:
        return "all earlier tokens are seen"
    if window + slack >= max_len:
        return f"a window of {window} and a slack of {slack} are no less than max_len={max_len}"
    return None


def _state_of(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> ir.Var:
    """Returns the state that keys or values come from: above casts and the write of new tokens."""
    assert isinstance(atom, ir.Var)
    return _state_of(producer[atom].invars[0], producer) if atom in producer else atom


def _sizes_note(graph: Graph) -> str:
    """Says what a token takes where the cache grows with tokens, and what a whole row takes."""
    full = state_bytes(graph, 1, graph.max_len)
    grown = full - state_bytes(graph, 1, 0)
    return f"{grown / graph.max_len:g} bytes a token, {full} bytes a row of {graph.max_len} tokens"
