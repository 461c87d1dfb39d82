"""Make attention one operation, however it was written.

The operation is emitted *from the labels* of a match: a match that does not fit the labels cannot be emitted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.attention.find import Match, find_attention
from xlathe.attention.scores import Value
from xlathe.axes import Label, Labels
from xlathe.graph import Graph, Record
from xlathe.ops.attention import attention
from xlathe.pipeline import REASSOCIATED, Context, Keeps, Pass, is_forward
from xlathe.rewrite import Replacement, rewrite_graph
from xlathe.validate import deviation, tolerance


@final
@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Replaces softmax attention by the operation `attention`, with un-repeated key-value heads."""

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        matches, misses = find_attention(graph.jaxpr)
        sizes = {"b": 2, "t": min(5, graph.max_len)}
        replacements, rewrites = {}, []
        for match in matches[: context.limit]:
            small = dataclasses.replace(match, sizes={a: ir.substitute(size, sizes) for a, size in match.sizes.items()})
            error = deviation(graph.jaxpr, match.result.var, _replacement(small), _samples(small, sizes), sizes)
            if error <= tolerance(_dtypes(match)):
                replacements[match.result.var] = _replacement(match)
                rewrites.append(f"attention at {ir.source_line(match.softmax)}")
            else:
                misses += (f"looks like attention but differs by {error:.1e} at {ir.source_line(match.softmax)}",)
        hits = {"attention": len(replacements)}
        record = Record("fuse_attention", hits=hits, misses=misses, rewrites=tuple(rewrites))
        return rewrite_graph(graph, replacements), record


def _replacement(match: Match) -> Replacement:
    products = (value for pair in match.pairs for value in (pair.q, pair.k))
    operands = (match.v, *products, *(t.value for t in match.terms))
    return Replacement(tuple(o.var for o in operands), _Emitter(match).emit, match.softmax)


def _samples(match: Match, sizes: Mapping[str, int]) -> dict[ir.Var, np.ndarray]:
    """Random operands: scores of unit variance, and masks that leave every query its first key."""
    random = np.random.default_rng(0)

    def normal(value: Value, deviation: float = 1.0) -> np.ndarray:
        return (random.normal(size=_shape(value, sizes)) * deviation).astype(value.var.aval.dtype)

    samples = {match.v.var: normal(match.v)}
    for pair in match.pairs:
        deep = float(np.prod([match.sizes[a] for a in pair.contracted]))
        samples[pair.q.var] = normal(pair.q, 1 / (abs(match.scale * pair.factor) * deep**0.5))
        samples[pair.k.var] = normal(pair.k)
    for term in match.terms:
        shape, dtype = _shape(term.value, sizes), term.value.var.aval.dtype
        if term.kind == "mask":
            keep = random.random(shape) < 0.6
            first = tuple(0 if set(label) & set(match.keys) else slice(None) for label in term.value.labels)
            keep[first] = True
            samples.setdefault(term.value.var, keep == term.keep_when)
        else:
            low = 0.1 if term.kind == "weight" else -1.0
            samples.setdefault(term.value.var, random.uniform(low, 1.0, shape).astype(dtype))
    return samples


def _shape(value: Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return ir.substitute(tuple(value.var.aval.shape), sizes)


def _dtypes(match: Match) -> set[str]:
    """Returns what an attention is computed in and from."""
    values = [match.v, *(value for pair in match.pairs for value in (pair.q, pair.k))]
    return {*match.dtypes.values(), *(str(value.var.aval.dtype) for value in values)}


@dataclasses.dataclass(frozen=True)
class _Emitter:
    """Traces the operation of a match, between the author's layouts."""

    match: Match

    def emit(self, v: jax.Array, *operands: jax.Array) -> jax.Array:
        """Traces the operation on operands in the author's layout; returns the author's layout."""
        b, t, h, g, s = self.match.batch, self.match.queries, self.match.heads, self.match.groups, self.match.keys
        products, terms = operands[: 2 * len(self.match.pairs)], operands[2 * len(self.match.pairs) :]
        mask, bias = self._combine(terms, (b, h, g, t, s))
        out = attention(
            self._beside(products[::2], [p.q for p in self.match.pairs], (b, t, h, g), scaled=True),
            self._beside(products[1::2], [p.k for p in self.match.pairs], (b, s, h)),
            self._arrange(v, self.match.v.labels, (b, s, h, self.match.features)),
            *(term for term in (mask, bias) if term is not None),
            scale=self.match.scale,
            softcap=self.match.softcap,
            masked=mask is not None,
            biased=bias is not None,
            **self.match.dtypes,
        )
        return self._restore(out, (b, t, h, g, self.match.features))

    def _beside(
        self, arrays: Sequence[jax.Array], values: Sequence[Value], order: Labels, scaled: bool = False
    ) -> jax.Array:
        """Puts the features of all products beside each other: one product then is the sum of theirs."""
        pieces = []
        for x, value, pair in zip(arrays, values, self.match.pairs, strict=True):
            whole = (*order, pair.contracted)
            piece = jnp.broadcast_to(
                self._arrange(x, value.labels, whole, broadcast=True), [self._size(label) for label in whole]
            )
            pieces.append(piece * jnp.asarray(pair.factor, x.dtype) if scaled and pair.factor != 1 else piece)
        return jnp.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]

    def _combine(self, values: tuple[jax.Array, ...], order: Labels) -> tuple[jax.Array | None, jax.Array | None]:
        mask = bias = None
        for term, value in zip(self.match.terms, values, strict=True):
            arranged = self._arrange(value, term.value.labels, order, broadcast=True)
            if term.kind == "mask":
                keep = arranged if term.keep_when else ~arranged
                mask = keep if mask is None else mask & keep
            else:
                added = jnp.log(arranged) if term.kind == "weight" else arranged
                scaled = added.astype(jnp.float32) * term.factor
                bias = scaled if bias is None else bias + scaled
        return mask, bias

    def _size(self, label: Label) -> ir.Dim:
        size: ir.Dim = 1
        for atom in label:
            size = size * self.match.sizes[atom]
        return size

    def _arrange(self, x: jax.Array, labels: Labels, order: Labels, broadcast: bool = False) -> jax.Array:
        """Splits, transposes and merges axes to `order`; with `broadcast`, atoms that x lacks get size 1."""
        atoms = [a for label in labels for a in label]
        wanted = [a for label in order for a in label if a in atoms]
        split = x.reshape([self.match.sizes[a] for a in atoms])
        moved = split.transpose([atoms.index(a) for a in wanted])
        if not broadcast:
            return moved.reshape([self._size(label) for label in order])
        spread = moved.reshape([self.match.sizes[a] if a in atoms else 1 for label in order for a in label])
        full = [
            [self.match.sizes[a] for a in label] if any(a in atoms for a in label) else [1] * len(label)
            for label in order
        ]
        spread = jnp.broadcast_to(spread, [n for sizes in full for n in sizes])
        merged = [self._size(label) if any(a in atoms for a in label) else 1 for label in order]
        return spread.reshape(merged)

    def _restore(self, out: jax.Array, order: Labels) -> jax.Array:
        atoms = [a for label in order for a in label]
        wanted = [a for label in self.match.result.labels for a in label]
        split = out.reshape([self.match.sizes[a] for a in atoms]).transpose([atoms.index(a) for a in wanted])
        return split.reshape([self._size(label) for label in self.match.result.labels])
