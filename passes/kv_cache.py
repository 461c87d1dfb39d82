"""Derive the incremental step and its cache from a plain forward over whole sequences.

The forward [b, t] becomes a step on a flat list of n tokens from any rows. Everything outside attention is proved to
treat each token on its own (`audit`), so it runs unchanged on the list; `arange(t)` becomes the tokens' positions
(`positions`). Keys and values of attention are what earlier tokens must leave behind: they are the cache. Masks are
evaluated at every pair of positions (`masks`), which also proves that no token sees a later one.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax import export

from xlathe import jaxpr as ir
from xlathe.absorb import absorb_projections
from xlathe.audit import layouts_of
from xlathe.errors import DeriveError
from xlathe.graph import Graph, Input, Record
from xlathe.layouts import Layout
from xlathe.masks import MaskPlan, NotCausal, TermsAt, plan_mask
from xlathe.ops.cached_attention import cached_attention
from xlathe.ops.write_slots import write_slots
from xlathe.passes.canonicalize import merge_equal
from xlathe.pipeline import REASSOCIATED, Context, Keeps, Pass, is_forward, is_step
from xlathe.positions import Role, Roles, Static
from xlathe.shifts import only_shifts
from xlathe.step import ARGUMENTS

# what happens to a mask between the line that makes it and the operation
FINISHING = frozenset({"reshape", "transpose", "broadcast_in_dim", "convert_element_type", "not", "and"})
TERM_QUERIES, TERM_KEYS = 3, 4  # axes of a mask or bias [b, k, g, t, s] of `attention`


@final
@dataclasses.dataclass(frozen=True)
class KVCache(Pass):
    """Turns a forward graph into a step graph with one cache a remembered value.

    Raises DeriveError, naming operation and line, where the graph mixes tokens outside attention, where a mask lets
    a token see a later one, or where the total length is used as a number.
    """

    needs = (is_forward,)
    gives = (is_step,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        inlined = ir.inline_calls(graph.jaxpr, lambda eqn: eqn.primitive.name in ir.INLINED | ir.CUSTOM_DERIVATIVE)
        graph, absorbed, misses = absorb_projections(graph.replace(jaxpr=inlined))
        if absorbed:
            graph = graph.replace(jaxpr=merge_equal(graph.jaxpr)[0])  # layers may share keys and values
        deriver = _Deriver(graph)
        names = [f"cache/{i}" for i in range(len(deriver.remembered))]
        jaxpr = deriver.trace()
        inputs = (
            *(i for i in graph.inputs if i.kind != "arg"),
            *(Input(name, "arg") for name in ARGUMENTS),
            *(Input(name, "state") for name in names),
        )
        plans = tuple(dict.fromkeys(map(str, deriver.plans.values())))
        return graph.replace(jaxpr=jaxpr, inputs=inputs), Record(
            "kv_cache",
            hits={"cached": len(deriver.remembered)},
            misses=misses,
            notes=(f"{deriver.bytes_per_token} bytes a token", *absorbed, *plans),
        )


class _Deriver:
    """One derivation: the audited forward, what it must remember, and the trace of its step."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.jaxpr = graph, graph.jaxpr
        (self.tokens,) = (v for v, i in zip(self.jaxpr.invars, graph.inputs, strict=True) if i.kind == "arg")
        self.layouts = layouts_of(graph)
        self.equations = ir.live_equations(self.jaxpr)
        self.producer = ir.producers(self.equations)
        self.attentions = [e for e in self.equations if ir.is_op(e, "attention")]
        self.planned: dict[str, MaskPlan] = {}
        self.plans = {id(e): self._plan(e) for e in self.attentions}
        self.remembered = list(dict.fromkeys(v for e in self.attentions for v in self.remembered_by(e)))
        self.needed = self._needed_everywhere()

    @property
    def bytes_per_token(self) -> int:
        return sum(v.aval.dtype.itemsize * _numel(v.aval.shape[2:]) for v in self.remembered)

    def remembered_by(self, attention: ir.JaxprEqn) -> tuple[ir.Var, ir.Var]:
        """Returns what to remember for keys and for values; the same where values are the beginning of the keys."""
        keys, values = attention.invars[1:3]
        return self._unwidened(keys), self._unwidened(keys if self.shared_features(attention) else values)

    def shared_features(self, attention: ir.JaxprEqn) -> int | None:
        """Returns how many features values have, where they are the first ones of the keys."""
        keys, values = attention.invars[1:3]
        eqn = self.producer.get(values) if isinstance(values, ir.Var) else None
        if eqn is None or eqn.primitive.name != "slice" or eqn.invars[0] is not keys:
            return None
        kept = all(ir.same_dim(n, m) for n, m in zip(values.aval.shape[:-1], keys.aval.shape[:-1], strict=True))
        return int(values.aval.shape[-1]) if kept and not any(eqn.params["start_indices"]) else None

    def _unwidened(self, atom: ir.Atom) -> ir.Var:
        """Returns the value to remember for a key or value: before a widening cast, which is cheap to redo."""
        assert isinstance(atom, ir.Var)
        eqn = self.producer.get(atom)
        if eqn is None or eqn.primitive.name != "convert_element_type":
            return atom
        source = eqn.invars[0]
        narrower = isinstance(source, ir.Var) and source.aval.dtype.itemsize < atom.aval.dtype.itemsize
        return self._unwidened(source) if narrower else atom

    def _needed_everywhere(self) -> set[ir.Var]:
        """Values that every new token needs, because something remembered depends on them."""
        needed: set[ir.Var] = set()
        stack = list(self.remembered)
        while stack:
            var = stack.pop()
            if var in needed or not self.layouts[var].of_tokens:
                continue
            needed.add(var)
            if var in self.producer:
                stack.extend(a for a in self.producer[var].invars if isinstance(a, ir.Var))
        return needed

    def routes(self, eqn: ir.JaxprEqn) -> bool:
        """Says whether an equation sorts tokens by their experts, counts them, or says where they went."""
        values = [a for a in (*eqn.invars, *eqn.outvars) if isinstance(a, ir.Var)]
        return any((root := self.layouts[a].root) is not None and root.kind != "expert" for a in values)

    def _plan(self, eqn: ir.JaxprEqn) -> MaskPlan:
        """Finds what an attention's mask and bias let through."""
        for term in eqn.invars[3:]:
            if self._uses_length(term) and not only_shifts(self.producer, term, TERM_KEYS):
                raise DeriveError(
                    "no incremental step: a mask or bias uses the total length as a number, which earlier tokens "
                    f"cannot know, at {self._line(term, eqn)}"
                )
        try:
            return self._plan_once(lambda queries, keys: self._mask_terms(eqn, queries, keys))
        except NotCausal as seen:
            mask = eqn.invars[3] if len(eqn.invars) > 3 else eqn.outvars[0]
            raise DeriveError(f"no incremental step: attention {seen} at {self._line(mask, eqn)}") from None

    def _plan_once(self, terms_at: TermsAt) -> MaskPlan:
        """Evaluates a mask, unless another layer's is the same program and reads nothing."""
        queries, keys = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (1, self.graph.max_len))
        program = ir.trace(terms_at, queries, keys)
        if program.consts:
            return plan_mask(terms_at, self.graph.max_len)
        if (text := str(program)) not in self.planned:
            self.planned[text] = plan_mask(terms_at, self.graph.max_len)
        return self.planned[text]

    def _line(self, atom: ir.Atom, attention: ir.JaxprEqn) -> str:
        """Returns the line where a mask was made, above the views that arranged it for the operation."""
        eqn = self.producer.get(atom) if isinstance(atom, ir.Var) else None
        while eqn is not None and eqn.primitive.name in FINISHING:
            above = self.producer.get(eqn.invars[0]) if isinstance(eqn.invars[0], ir.Var) else None
            if above is None:
                break
            eqn = above
        return ir.source_line(eqn or attention)

    def _uses_length(self, atom: ir.Atom) -> bool:
        return any(e.primitive.name == "dim_as_value" for e in self._upstream(atom))

    def _upstream(self, atom: ir.Atom) -> list[ir.JaxprEqn]:
        seen: dict[int, ir.JaxprEqn] = {}
        stack = [atom]
        while stack:
            eqn = self.producer.get(a) if isinstance(a := stack.pop(), ir.Var) else None
            if eqn is not None and id(eqn) not in seen:
                seen[id(eqn)] = eqn
                stack.extend(eqn.invars)
        return list(seen.values())

    def _mask_terms(self, eqn: ir.JaxprEqn, queries: jax.Array, keys: jax.Array) -> Any:
        """Evaluates what may hide a key; a bias that is trained is no mask, whatever its value is today."""
        mask, bias = _split_terms(eqn)
        terms = (mask, None if bias is None or self._is_trained(bias) else bias)
        static = Static(self.jaxpr, self.layouts, self._known(terms), self.graph.max_len, length=1)
        spread = (queries.shape[0], keys.shape[0])
        values = []
        for term in terms:
            value = None if term is None else self._term(static, term, Role(queries), Role(keys))
            values.append(None if value is None else jnp.broadcast_to(value, (*value.shape[:-2], *spread)))
        return values

    def _is_trained(self, atom: ir.Atom) -> bool:
        weights = {v for v, i in zip(self.jaxpr.invars, self.graph.inputs, strict=True) if i.kind == "weight"}
        return any(a in weights for e in self._upstream(atom) for a in e.invars if isinstance(a, ir.Var))

    def _known(self, terms: Iterable[ir.Atom | None]) -> dict[ir.Var, Any]:
        """Returns the inputs that terms are made from; others may be large, and take a recipe to make."""
        atoms = [a for t in terms if t is not None for a in (t, *(a for e in self._upstream(t) for a in e.invars))]
        read = {a for a in atoms if isinstance(a, ir.Var)}
        inputs = zip(self.jaxpr.invars, self.graph.inputs, strict=True)
        names = {v: i.name for v, i in inputs if i.kind != "arg" and v in read}
        arrays = self.graph.weights.prepare(list(names.values()))
        return {v: jnp.asarray(arrays[name]) for v, name in names.items()}

    @staticmethod
    def _term(static: Static, term: ir.Atom, queries: Role, keys: Role) -> jax.Array:
        roles: list[Role | None] = [None] * 5
        for axis, role in ((TERM_QUERIES, queries), (TERM_KEYS, keys)):
            if ir.is_symbolic(term.aval.shape[axis]):
                roles[axis] = role
        return static(term, tuple(roles))

    def trace(self) -> ir.Jaxpr:
        """Traces the step with symbolic sizes: n tokens, m of them selected, r rows of s slots."""
        n, m, r, s = export.symbolic_shape(
            "n, m, r, s", constraints=["n >= 1", "m >= 1", "r >= 1", "s >= 1", f"s <= {self.graph.max_len}"]
        )
        held = [v.aval for v in self.jaxpr.invars if v is not self.tokens]
        counts = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (n, n, n, m)]
        states = [jax.ShapeDtypeStruct((r, s, *v.aval.shape[2:]), v.aval.dtype) for v in self.remembered]

        def step(*operands: Any) -> list[Any]:
            values, args = operands[: len(held)], operands[len(held) : len(held) + 4]
            known = dict(zip((v for v in self.jaxpr.invars if v is not self.tokens), values, strict=True))
            tokens, positions, rows, select = args
            return _Step(self, known, tokens, positions, rows, select, operands[len(held) + 4 :]).run()

        return ir.trace(step, *held, *counts, *states)


class _Step:
    """One traced evaluation of the step.

    A value that something remembered depends on is computed for all n tokens; any other only for the m selected ones.
    """

    def __init__(
        self,
        deriver: _Deriver,
        known: dict[ir.Var, Any],
        tokens: jax.Array,  # int32 [n]
        positions: jax.Array,  # int32 [n]
        rows: jax.Array,  # int32 [n]
        select: jax.Array,  # int32 [m]
        states: tuple[jax.Array, ...],  # each [r, s, ...]
    ) -> None:
        self.deriver, self.select = deriver, select
        self.static = Static(deriver.jaxpr, deriver.layouts, known, deriver.graph.max_len)
        self.shifted = Static(deriver.jaxpr, deriver.layouts, known, deriver.graph.max_len, length=1)
        chosen = jnp.take(positions, select, mode="clip"), jnp.take(rows, select, mode="clip")
        self.all, self.rows_all = Role(positions), rows
        self.some, self.rows_some = Role(chosen[0]), chosen[1]
        self.states = dict(zip(deriver.remembered, states, strict=True))
        self.written: dict[ir.Var, jax.Array] = {}
        self.values: dict[tuple[ir.Var, bool], Any] = {
            (deriver.tokens, True): tokens[None],
            (deriver.tokens, False): jnp.take(tokens, select, mode="clip")[None],
        }

    def run(self) -> list[Any]:
        """Returns logits [m, vocab] and the new states."""
        d = self.deriver
        for eqn in d.equations:
            if not d.layouts[eqn.outvars[0]].of_tokens:
                continue
            everywhere = any(out in d.needed for out in eqn.outvars)
            with ir.at_source_of(eqn):
                results = (
                    self._attention(eqn, everywhere) if ir.is_op(eqn, "attention") else self._apply(eqn, everywhere)
                )
            for out, value in zip(eqn.outvars, results, strict=True):
                self.values[out, everywhere] = value
        logits = self._value(d.jaxpr.outvars[0], everywhere=False)
        return [logits[0], *(self._write(v) for v in d.remembered)]

    def _value(self, atom: ir.Atom, everywhere: bool, roles: Roles | None = None) -> Any:
        """Reads a value for all tokens or for the selected ones; what is known for all is selected from."""
        d = self.deriver
        if isinstance(atom, ir.Literal):
            return atom.val
        if not d.layouts[atom].of_tokens:
            role = self.all if everywhere else self.some
            return self.static(atom, tuple(role if "t" in ir.dim_vars(n) else None for n in atom.aval.shape))
        if (atom, everywhere) not in self.values:
            if any("t" in factors for factors in d.layouts[atom].axes):
                self.values[atom, False] = _take_tokens(self.values[atom, True], self.select, d.layouts[atom])
            else:  # sorted, or counted: to be done again for the selected ones
                eqn = d.producer[atom]
                self.values.update(zip(((o, False) for o in eqn.outvars), self._apply(eqn, False), strict=True))
        return self.values[atom, everywhere]

    def _apply(self, eqn: ir.JaxprEqn, everywhere: bool) -> list[Any]:
        size = (self.all if everywhere else self.some).size
        read = self._listed if self.deriver.routes(eqn) else self._value
        return ir.bind_at(eqn, [read(a, everywhere) for a in eqn.invars], {"b": 1, "t": size})

    def _listed(self, atom: ir.Atom, everywhere: bool) -> Any:
        """Reads a value for the routing of tokens, where `arange(t)` numbers the list and is no position."""
        d = self.deriver
        if isinstance(atom, ir.Literal) or d.layouts[atom].of_tokens or atom not in d.producer:
            return self._value(atom, everywhere)
        eqn = d.producer[atom]
        sizes = {"b": 1, "t": (self.all if everywhere else self.some).size}
        return ir.bind_at(eqn, [self._listed(a, everywhere) for a in eqn.invars], sizes)[eqn.outvars.index(atom)]

    def _write(self, var: ir.Var) -> jax.Array:
        """Returns the cache of a remembered value with the new tokens in it."""
        if var not in self.written:
            new = self._value(var, everywhere=True)[0]
            self.written[var] = write_slots(self.states[var], new, self.rows_all, self.all.positions)
        return self.written[var]

    def _attention(self, eqn: ir.JaxprEqn, everywhere: bool) -> list[Any]:
        d, plan = self.deriver, self.deriver.plans[id(eqn)]
        query, rows = (self.all, self.rows_all) if everywhere else (self.some, self.rows_some)
        caches = map(self._write, d.remembered_by(eqn))
        keys, values = (cache.astype(a.aval.dtype) for cache, a in zip(caches, eqn.invars[1:3], strict=True))
        mask, bias = _split_terms(eqn)
        slots = Role(jnp.arange(keys.shape[1], dtype=jnp.int32))
        terms = [
            self._spread(d._term(self.shifted, term, query, slots), query, slots)
            for term, wanted in ((mask, not plan.exact), (bias, plan.biased or not plan.exact or self._trained(bias)))
            if term is not None and wanted
        ]
        biased = bias is not None and (plan.biased or not plan.exact or self._trained(bias))
        attributes = {**ir.attributes(eqn), "masked": mask is not None and not plan.exact, "biased": biased}
        if (shared := d.shared_features(eqn)) is not None:
            attributes["shared"] = shared
        out = cached_attention(
            self._value(eqn.invars[0], everywhere)[0], keys, values, rows, query.positions, *terms,
            window=plan.window if plan.exact else None, **attributes,
        )  # fmt: skip
        return [out[None]]

    def _trained(self, bias: ir.Atom | None) -> bool:
        return bias is not None and self.deriver._is_trained(bias)

    @staticmethod
    def _spread(term: jax.Array, query: Role, slots: Role) -> jax.Array:
        """Drops the batch axis of a term and gives it full axes of queries and slots: [k | 1, g | 1, n, s]."""
        return jnp.broadcast_to(term[0], (*term.shape[1:3], query.size, slots.size))


def _take_tokens(value: jax.Array, select: jax.Array, layout: Layout) -> jax.Array:
    """Takes some tokens of a value for all n; tokens may be merged with static parts of an axis."""
    axis, factors = next((i, f) for i, f in enumerate(layout.axes) if "t" in f)
    place = factors.index("t")
    outer, inner = (_numel([f for f in part if isinstance(f, int)]) for part in (factors[:place], factors[place + 1 :]))
    apart = value.reshape(*value.shape[:axis], outer, -1, inner, *value.shape[axis + 1 :])
    taken = jnp.take(apart, select, axis=axis + 1, mode="clip")
    return taken.reshape(*value.shape[:axis], -1, *value.shape[axis + 1 :])


def _split_terms(eqn: ir.JaxprEqn) -> tuple[ir.Atom | None, ir.Atom | None]:
    """Returns mask and bias of an `attention` equation."""
    terms = list(eqn.invars[3:])
    mask = terms.pop(0) if eqn.params["masked"] else None
    return mask, terms.pop(0) if eqn.params["biased"] else None


def _numel(shape: Sequence[ir.Dim]) -> int:
    size = 1
    for n in shape:
        size *= int(n)
    return size
