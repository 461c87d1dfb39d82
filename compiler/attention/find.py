"""Find attention by its axis labels, however it was written.

The anchor is a softmax. From it the scores are followed upward to the `dot_general` of queries and keys, and the
probabilities downward to the `dot_general` with values; both are read as einsums over labelled axes, so that layout,
grouping and repeats of heads need no pattern of their own.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.attention.scores import Miss, Product, Scores, ScoresWalk, Term, Value, strip
from xlathe.attention.softmax import Softmax, find_softmaxes
from xlathe.axes import Axes, Einsum, Label, Labels, NoLabels
from xlathe.values import is_zero


@dataclasses.dataclass(frozen=True)
class Pair:
    """Queries and keys, the atoms that their product sums over, and what the product is multiplied by."""

    q: Value
    k: Value
    contracted: Label
    factor: float


@dataclasses.dataclass(frozen=True)
class Match:
    """An attention: its operands with labels, and the roles of the atoms in them.

    pairs: whose products the scores are the sum of. The first has every axis of queries and keys.
    """

    softmax: ir.JaxprEqn
    result: Value
    pairs: tuple[Pair, ...]
    v: Value
    terms: tuple[Term, ...]
    scale: float
    softcap: float | None
    dtypes: Mapping[str, str]
    sizes: Mapping[int, ir.Dim]
    batch: Label
    heads: Label
    queries: Label
    groups: Label
    keys: Label
    features: Label


def find_attention(jaxpr: ir.Jaxpr) -> tuple[list[Match], tuple[str, ...]]:
    """Returns every attention in the graph, and why each other softmax is none."""
    anchors, strangers = find_softmaxes(jaxpr)
    matches = []
    misses = [f"exponentials are divided by a sum that is not theirs at {ir.source_line(eqn)}" for eqn in strangers]
    for anchor in anchors:
        try:
            matches.append(_Matcher(jaxpr, anchor).match())
        except Miss as miss:
            misses.append(f"{miss} (softmax at {ir.source_line(anchor.total)})")
        except NoLabels as unlabelled:
            misses.append(f"{unlabelled} around the softmax at {ir.source_line(anchor.total)}")
    return matches, tuple(dict.fromkeys(misses))


@dataclasses.dataclass(frozen=True)
class _Product:
    """The product of probabilities and values, and what becomes of it."""

    values: Value
    result: Value
    probs_dtype: str


class _Matcher:
    """Follows one softmax up to queries and keys and down to values, with labels."""

    def __init__(self, jaxpr: ir.Jaxpr, anchor: Softmax) -> None:
        self.anchor = anchor
        self.axes = Axes()
        self.producer = ir.producers(jaxpr.eqns)
        self.consumer = ir.consumers(jaxpr.eqns)
        self.outputs = {a for a in jaxpr.outvars if isinstance(a, ir.Var)}

    def match(self) -> Match:
        probs = self.anchor.probs
        labels = self.axes.fresh_all(probs.aval.shape)
        keys = labels[self.anchor.axis]
        scores = ScoresWalk(self.anchor, self.axes, self.producer, keys).run(labels)
        pairs = [self._pair(product, keys) for product in scores.products]
        pairs.sort(key=lambda pair: -len(self._atoms(pair.k)))
        product = self._values(probs, labels, keys, scores.terms)
        return self._assemble(pairs, product, scores, keys)

    def _pair(self, product: Product, keys: Label) -> Pair:
        """Reads which side of a product the queries are, and which the keys."""
        einsum = Einsum.of(product.eqn)
        sides = einsum.operand_labels(self.axes, product.eqn, product.labels)
        left, right = (self._strip(Value(a, own)) for a, own in zip(product.eqn.invars, sides, strict=True))
        summed = tuple(a for i, _ in einsum.contracted for a in sides[0][i])
        if not keys or not set(self.axes.resolve(keys)) & set(self._atoms(left, right)):
            raise Miss("the softmax axis is on neither side of the product before it", product.eqn)
        k, q = (left, right) if set(self.axes.resolve(keys)) <= set(self._atoms(left)) else (right, left)
        return Pair(q, k, summed, product.factor)

    def _strip(self, value: Value) -> Value:
        return strip(value, self.axes, self.producer)

    def _atoms(self, *values: Value) -> Label:
        return tuple(a for value in values for label in value.labels for a in self.axes.resolve(label))

    def _values(self, probs: ir.Var, labels: Labels, keys: Label, terms: tuple[Term, ...]) -> _Product:
        """Walks from the softmax down to the product with values."""
        current, masked = probs, not self.anchor.masked_late
        while (eqn := self._only_use(current)).primitive.name != "dot_general":
            if eqn.primitive.name == "select_n":
                self._check_masked_again(eqn, current, labels, terms)
                current, masked = eqn.outvars[0], True
                continue
            current, labels = self._below(eqn, current, labels, self.anchor.probs.aval.dtype)
        if not masked:
            raise Miss("a mask acts on the sum of the exponentials alone", self.anchor.total)
        side = 0 if eqn.invars[0] is current else 1
        other = eqn.invars[1 - side]
        einsum = Einsum.of(eqn)
        probs_axes, value_axes = (einsum.lhs, einsum.rhs) if side == 0 else (einsum.rhs, einsum.lhs)
        summed = [pair[side] for pair in einsum.contracted]
        if [a for i in summed for a in self.axes.resolve(labels[i])] != list(self.axes.resolve(keys)):
            raise Miss("the product with the values does not sum over the softmax axis", eqn)
        result: dict[int, Label] = {out: labels[i] for i, out in enumerate(probs_axes) if out is not None}
        value_labels = []
        for i, out in enumerate(value_axes):
            pair = next((p for p in einsum.contracted if p[1 - side] == i), None)
            if pair is not None:
                value_labels.append(labels[pair[side]])
            else:
                assert out is not None
                value_labels.append(result.setdefault(out, self.axes.fresh(other.aval.shape[i])))
        made = Value(eqn.outvars[0], tuple(result[i] for i in range(len(result))))
        return _Product(Value(other, tuple(value_labels)), self._divided(made), str(current.aval.dtype))

    def _only_use(self, value: ir.Var) -> ir.JaxprEqn:
        uses = [e for e in self.consumer.get(value, []) if e is not self.anchor.total]
        if len(uses) != 1 or value in self.outputs:
            raise Miss(f"the probabilities are used {len(uses) + (value in self.outputs)} times", self.anchor.total)
        return uses[0]

    def _check_masked_again(
        self, eqn: ir.JaxprEqn, current: ir.Var, labels: Labels, terms: tuple[Term, ...]
    ) -> None:
        """softmax(where=) says its mask twice; another mask would leave probabilities that do not sum to 1."""
        mask = self._resolved(self._strip(Value(eqn.invars[0], labels if eqn.invars[0].aval.ndim else ())))
        known = [self._resolved(t.value) for t in terms if t.kind == "mask" and t.keep_when]
        if mask not in known or eqn.invars[2] is not current or not is_zero(eqn.invars[1], self.producer):
            raise Miss("probabilities are masked by something that the scores are not masked by", eqn)

    def _below(self, eqn: ir.JaxprEqn, value: ir.Var, labels: Labels, first: jnp.dtype) -> tuple[ir.Var, Labels]:
        """Walks down one view; of casts only one, from the `first` dtype, since two may round in between."""
        if eqn.primitive.name == "convert_element_type":
            after = eqn.outvars[0].aval.dtype
            if value.aval.dtype != first or not jnp.issubdtype(after, jnp.floating):
                raise Miss(f"a cast from {value.aval.dtype} to {after} after the softmax", eqn)
        lower = self.axes.forward(eqn, labels)
        if lower is None:
            raise Miss(f"{eqn.primitive.name} between the softmax and the values", eqn)
        return eqn.outvars[0], lower

    def _divided(self, made: Value) -> Value:
        """Where the division by the sum comes after the product with the values, walks down to it."""
        var, labels = made.var, made.labels
        while self.anchor.division is not None and var is not self.anchor.division.outvars[0]:
            eqn = self.consumer[var][0]
            if len(self.consumer[var]) != 1 or var in self.outputs:
                raise Miss("the undivided result is used more than once", eqn)
            if eqn is self.anchor.division:
                var = eqn.outvars[0]
            else:
                var, labels = self._below(eqn, var, labels, made.var.aval.dtype)
        return Value(var, labels)

    def _assemble(self, pairs: Sequence[Pair], product: _Product, scores: Scores, keys: Label) -> Match:
        """Gives every atom its role, and refuses atoms that have none in attention."""
        v, key, dot = self._strip(product.values), self.axes.resolve(keys), scores.products[0].eqn
        in_q, in_k, in_v = (self._atoms(value) for value in (pairs[0].q, pairs[0].k, v))
        shared = [a for a in in_q if a in in_k and a in in_v]
        contracted = tuple(a for a in in_q if a in in_k and a not in in_v)
        only_q = [a for a in in_q if a not in in_k and a not in in_v]
        features = tuple(a for a in in_v if a not in in_q and a not in in_k)
        queries = tuple(a for a in only_q if self.axes.sizes[a] == self.axes.sizes[key[0]])
        if len(key) != 1 or "t" not in ir.dim_vars(self.axes.sizes[key[0]]):
            raise Miss("the softmax runs over an axis that is not the tokens", self.anchor.total)
        if not contracted:
            raise Miss("queries and keys share no axis that is summed over", dot)
        if set(contracted) != set(self.axes.resolve(pairs[0].contracted)):
            raise Miss("queries and keys share an axis that the values have not", dot)
        if len(queries) != 1:
            raise Miss("not one axis of queries beside one axis of keys", dot)
        stray = [a for a in (*in_k, *in_v) if a not in (*shared, *contracted, *features, *key)]
        if stray or not set(key) <= set(in_k) & set(in_v):
            raise Miss("keys and values have axes that are no part of attention", dot)
        for added, pair in zip(scores.products[1:], pairs[1:], strict=True):
            self._check_added(added.eqn, pair, {*in_q} - {*contracted}, {*shared, *key})
        if any(not set(self._atoms(t.value)) <= {*in_q, *in_v, *key} for t in scores.terms):
            raise Miss("a mask or bias with axes that the scores have not", self.anchor.total)
        batch = tuple(a for a in shared if "b" in ir.dim_vars(self.axes.sizes[a]))
        return Match(
            softmax=self.anchor.total,
            result=self._resolved(product.result),
            pairs=tuple(
                Pair(self._resolved(p.q), self._resolved(p.k), self.axes.resolve(p.contracted), p.factor) for p in pairs
            ),
            v=self._resolved(v),
            terms=tuple(dataclasses.replace(t, value=self._resolved(t.value)) for t in scores.terms),
            scale=scores.scale,
            softcap=scores.softcap,
            dtypes={
                "scores_dtype": str(dot.outvars[0].aval.dtype),
                "softmax_dtype": str(self.anchor.probs.aval.dtype),
                "probs_dtype": product.probs_dtype,
                "out_dtype": str(product.result.var.aval.dtype),
            },
            sizes=self.axes.sizes,
            batch=batch,
            heads=tuple(a for a in shared if a not in batch),
            queries=queries,
            groups=tuple(a for a in only_q if a not in queries),
            keys=key,
            features=features,
        )

    def _check_added(self, dot: ir.JaxprEqn, pair: Pair, of_queries: set[int], of_keys: set[int]) -> None:
        """A further product may lack axes of heads, as a rotary key that all heads share does; it has no own ones."""
        summed = set(self.axes.resolve(pair.contracted))
        own = set(self._atoms(pair.q)) - summed - of_queries, set(self._atoms(pair.k)) - summed - of_keys
        if any(own) or not summed or summed & (of_queries | of_keys):
            raise Miss("two products are added that do not have the same axes", dot)

    def _resolved(self, value: Value) -> Value:
        return Value(value.var, tuple(self.axes.resolve(label) for label in value.labels))
