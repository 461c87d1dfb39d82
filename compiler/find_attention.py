"""Find attention by its axis labels, however it was written.

The anchor is a softmax. From it the scores are followed upward to the `dot_general` of queries and keys, and the
probabilities downward to the `dot_general` with values; both are read as einsums over labelled axes, so that layout,
grouping and repeats of heads need no pattern of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from xlathe import jaxpr as ir
from xlathe.axes import Axes, Einsum, Label, Labels, NoLabels
from xlathe.masks import MASKED_BELOW
from xlathe.softmax import Softmax, find_softmaxes, is_zero
from xlathe.values import uniform_value


class Miss(Exception):
    """Why a softmax is not attention, and the equation that says so."""

    def __init__(self, reason: str, eqn: ir.JaxprEqn) -> None:
        super().__init__(f"{reason} at {ir.source_line(eqn)}")


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the graph and the labels of its axes."""

    var: ir.Var
    labels: Labels


@dataclasses.dataclass(frozen=True)
class Term:
    """Something that acts on the scores.

    kind: `mask` (kept where it equals `keep_when`), `bias` (added, times `factor`) or `weight` (multiplies the
    exponentials: its logarithm is a bias).
    """

    value: Value
    kind: Literal["mask", "bias", "weight"]
    keep_when: bool = True
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Match:
    """An attention: its operands with labels, and the roles of the atoms in them."""

    softmax: ir.JaxprEqn
    result: ir.Var
    result_labels: Labels
    q: Value
    k: Value
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
    contracted: Label
    features: Label


def find_attention(jaxpr: ir.Jaxpr) -> tuple[list[Match], tuple[str, ...]]:
    """Returns every attention in the graph, and why each other softmax is none."""
    matches, misses = [], []
    for anchor in find_softmaxes(jaxpr):
        try:
            matches.append(_Matcher(jaxpr, anchor).match())
        except Miss as miss:
            misses.append(f"{miss} (softmax at {ir.source_line(anchor.total)})")
        except NoLabels as unlabelled:
            misses.append(f"{unlabelled} around the softmax at {ir.source_line(anchor.total)}")
    return matches, tuple(dict.fromkeys(misses))


class _Matcher:
    """Follows one softmax up to queries and keys and down to values, with labels."""

    def __init__(self, jaxpr: ir.Jaxpr, anchor: Softmax) -> None:
        self.anchor = anchor
        self.axes = Axes()
        self.producer = ir.producers(jaxpr.eqns)
        self.consumer = ir.consumers(jaxpr.eqns)
        self.products: dict[ir.Var, bool] = {}
        self.outputs = {a for a in jaxpr.outvars if isinstance(a, ir.Var)}

    def match(self) -> Match:
        probs = self.anchor.probs
        labels = self.axes.fresh_all(probs.aval.shape)
        keys = labels[self.anchor.axis]
        terms, scale, softcap, dot, score_labels = self._scores(labels)
        left, right = Einsum.of(dot).operand_labels(self.axes, dot, score_labels)
        operands = [self._strip(Value(a, ls)) for a, ls in zip(dot.invars, (left, right), strict=True)]
        if not keys or not set(self.axes.resolve(keys)) & set(self._atoms(operands[0], operands[1])):
            raise Miss("the softmax axis is on neither side of the product before it", dot)
        k, q = operands if set(self.axes.resolve(keys)) <= set(self._atoms(operands[0])) else operands[::-1]
        pv, v, result_labels, probs_dtype = self._values(probs, labels, keys)
        result, result_labels = self._divided(pv.outvars[0], result_labels)
        return self._assemble(
            q, k, self._strip(v), terms, scale, softcap, dot, result, result_labels, keys, probs_dtype
        )

    def _atoms(self, *values: Value) -> Label:
        return tuple(a for value in values for label in value.labels for a in self.axes.resolve(label))

    def _strip(self, value: Value) -> Value:
        """Walks up through views that cost nothing to redo; dtypes stay."""
        var, labels = value.var, value.labels
        while (eqn := self.producer.get(var)) is not None and eqn.primitive.name != "convert_element_type":
            try:
                upper = self.axes.backward(eqn, labels)
            except NoLabels:
                break
            if upper is None or not isinstance(eqn.invars[0], ir.Var):
                break
            var, labels = eqn.invars[0], upper
        return Value(var, labels)

    def _scores(self, labels: Labels) -> tuple[list[Term], float, float | None, ir.JaxprEqn, Labels]:
        """Walks from the softmax up to the product of queries and keys, collecting what acts on the scores."""
        terms: list[Term] = []
        scale, softcap, atom = 1.0, None, self.anchor.scores
        terms += [Term(Value(mask, labels), "mask") for mask in self.anchor.keep]
        terms += [Term(Value(weight, labels), "weight") for weight in self.anchor.factors]
        while True:
            eqn = self.producer.get(atom) if isinstance(atom, ir.Var) else None
            if eqn is None:
                raise Miss("no product of queries and keys before the softmax", self.anchor.total)
            name = eqn.primitive.name
            if name == "dot_general":
                return terms, scale, softcap, eqn, labels
            if name in ("mul", "div"):
                number, atom = self._scaled(eqn)
                scale *= number
            elif name in ("add", "sub"):
                atom, bias, sign = self._biased(eqn)
                if isinstance(bias, ir.Literal) or uniform_value(bias, self.producer) is not None:
                    continue  # the same number on every score is a shift, which softmax ignores
                terms.append(Term(Value(bias, labels), "bias", factor=sign * scale))
            elif name == "select_n":
                atom, mask, keep_when = self._masked(eqn)
                terms.append(Term(Value(mask, self._mask_labels(mask, labels)), "mask", keep_when=keep_when))
            elif name == "tanh" and softcap is None and scale > 0:
                softcap, atom = scale, eqn.invars[0]  # c tanh(x / c): the inner factor multiplies c
            else:
                upper = self.axes.backward(eqn, labels)
                if upper is None:
                    raise Miss(f"{name} between the product and the softmax", eqn)
                atom, labels = eqn.invars[0], upper
            if softcap is not None and name in ("add", "sub", "select_n"):
                raise Miss(f"{name} on the scores before the soft-cap", eqn)

    def _mask_labels(self, mask: ir.Atom, labels: Labels) -> Labels:
        return labels if mask.aval.ndim else ()

    def _scaled(self, eqn: ir.JaxprEqn) -> tuple[float, ir.Atom]:
        left, right = eqn.invars
        number = uniform_value(right, self.producer)
        if number is not None:
            return (1 / float(number) if eqn.primitive.name == "div" else float(number)), left
        number = uniform_value(left, self.producer)
        if number is not None and eqn.primitive.name == "mul":
            return float(number), right
        by = "the total length" if self._uses_length(eqn) else "something that is not one number"
        raise Miss(f"{eqn.primitive.name} of the scores by {by}", eqn)

    def _uses_length(self, eqn: ir.JaxprEqn) -> bool:
        """Says whether a factor is a number made from the length."""
        makers = [self.producer[a] for a in eqn.invars if isinstance(a, ir.Var) and a in self.producer]
        scalars = [m for m in makers if all(not x.aval.ndim for x in m.invars)]
        return any(m.primitive.name == "dim_as_value" or self._uses_length(m) for m in scalars)

    def _biased(self, eqn: ir.JaxprEqn) -> tuple[ir.Atom, ir.Atom, float]:
        left, right = eqn.invars
        if self._holds_product(left):
            return left, right, 1.0 if eqn.primitive.name == "add" else -1.0
        if self._holds_product(right) and eqn.primitive.name == "add":
            return right, left, 1.0
        raise Miss("a sum in which no side is a product of queries and keys", eqn)

    def _holds_product(self, atom: ir.Atom) -> bool:
        """Says whether a value is a dot product under operations that scores go through."""
        eqn = self.producer.get(atom) if isinstance(atom, ir.Var) else None
        if eqn is None:
            return False
        if eqn.outvars[0] not in self.products:
            self.products[eqn.outvars[0]] = self._makes_product(eqn)
        return self.products[eqn.outvars[0]]

    def _makes_product(self, eqn: ir.JaxprEqn) -> bool:
        name = eqn.primitive.name
        if name == "dot_general":
            return not _is_static_product(eqn)
        if name in ("add", "sub", "mul", "div"):
            return any(self._holds_product(a) for a in eqn.invars)
        if name == "select_n":
            return any(self._holds_product(a) for a in eqn.invars[1:])
        if name == "tanh" or self.axes.backward(eqn, self.axes.fresh_all(eqn.outvars[0].aval.shape)) is not None:
            return self._holds_product(eqn.invars[0])
        return False

    def _masked(self, eqn: ir.JaxprEqn) -> tuple[ir.Atom, ir.Atom, bool]:
        if len(eqn.invars) != 3:
            raise Miss("a select of more than two cases on the scores", eqn)
        mask, when_false, when_true = eqn.invars
        for fill, scores, keep_when in ((when_false, when_true, True), (when_true, when_false, False)):
            value = uniform_value(fill, self.producer)
            if value is not None and float(value) <= MASKED_BELOW:
                return scores, mask, keep_when
        raise Miss("a select on the scores without a large negative fill", eqn)

    def _values(self, probs: ir.Var, labels: Labels, keys: Label) -> tuple[ir.JaxprEqn, Value, Labels, str]:
        """Walks from the softmax down to the product with values."""
        current = probs
        while True:
            uses = [e for e in self.consumer.get(current, []) if e is not self.anchor.total]
            if len(uses) != 1 or current in self.outputs:
                raise Miss(
                    f"the probabilities are used {len(uses) + (current in self.outputs)} times", self.anchor.total
                )
            eqn = uses[0]
            if eqn.primitive.name == "dot_general":
                break
            if eqn.primitive.name == "select_n" and is_zero(eqn.invars[1], self.producer):
                current = eqn.outvars[0]  # probabilities are zero there already: softmax(where=) says it twice
                continue
            lower = self.axes.forward(eqn, labels)
            if lower is None:
                raise Miss(f"{eqn.primitive.name} between the softmax and the values", eqn)
            current, labels = eqn.outvars[0], lower
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
        result_labels = tuple(result[i] for i in range(len(result)))
        return eqn, Value(other, tuple(value_labels)), result_labels, str(current.aval.dtype)

    def _divided(self, var: ir.Var, labels: Labels) -> tuple[ir.Var, Labels]:
        """Where the division by the sum comes after the product with the values, walks down to it."""
        while self.anchor.division is not None and var is not self.anchor.division.outvars[0]:
            eqn = self.consumer[var][0]
            lower = labels if eqn is self.anchor.division else self.axes.forward(eqn, labels)
            if lower is None or len(self.consumer[var]) != 1:
                raise Miss(f"{eqn.primitive.name} before the division by the softmax's sum", eqn)
            var, labels = eqn.outvars[0], lower
        return var, labels

    def _assemble(
        self,
        q: Value,
        k: Value,
        v: Value,
        terms: list[Term],
        scale: float,
        softcap: float | None,
        dot: ir.JaxprEqn,
        result: ir.Var,
        result_labels: Labels,
        keys: Label,
        probs_dtype: str,
    ) -> Match:
        """Gives every atom its role, and refuses atoms that have none in attention."""
        key = self.axes.resolve(keys)
        in_q, in_k, in_v = (self._atoms(value) for value in (q, k, v))
        shared = [a for a in in_q if a in in_k and a in in_v]
        contracted = tuple(a for a in in_q if a in in_k and a not in in_v)
        only_q = [a for a in in_q if a not in in_k and a not in in_v]
        features = tuple(a for a in in_v if a not in in_q and a not in in_k)
        queries = tuple(a for a in only_q if self.axes.sizes[a] == self.axes.sizes[key[0]])
        if not contracted:
            raise Miss("queries and keys share no axis that is summed over", dot)
        if len(key) != 1 or len(queries) != 1:
            raise Miss("not one axis of queries beside one axis of keys", dot)
        stray = [a for a in (*in_k, *in_v) if a not in (*shared, *contracted, *features, *key)]
        if stray or not set(key) <= set(in_k) & set(in_v):
            raise Miss("keys and values have axes that are no part of attention", dot)
        batch = tuple(a for a in shared if "b" in ir.dim_vars(self.axes.sizes[a]))
        known = {*in_q, *in_v, *key}
        arranged = [self._term(t, known) for t in terms]
        return Match(
            softmax=self.anchor.total,
            result=result,
            result_labels=tuple(self.axes.resolve(label) for label in result_labels),
            q=self._resolved(q),
            k=self._resolved(k),
            v=self._resolved(v),
            terms=tuple(arranged),
            scale=scale,
            softcap=softcap,
            dtypes={
                "scores_dtype": str(dot.outvars[0].aval.dtype),
                "softmax_dtype": str(self.anchor.probs.aval.dtype),
                "probs_dtype": probs_dtype,
                "out_dtype": str(result.aval.dtype),
            },
            sizes=self.axes.sizes,
            batch=batch,
            heads=tuple(a for a in shared if a not in batch),
            queries=queries,
            groups=tuple(a for a in only_q if a not in queries),
            keys=key,
            contracted=contracted,
            features=features,
        )

    def _term(self, term: Term, known: set[int]) -> Term:
        """Strips a mask or bias to its smallest form; its axes must be axes of the scores."""
        stripped = self._resolved(self._strip(term.value)) if isinstance(term.value.var, ir.Var) else term.value
        if not set(self._atoms(stripped)) <= known:
            raise Miss("a mask or bias with axes that the scores have not", self.anchor.total)
        return dataclasses.replace(term, value=stripped)

    def _resolved(self, value: Value) -> Value:
        return Value(value.var, tuple(self.axes.resolve(label) for label in value.labels))


def _is_static_product(eqn: ir.JaxprEqn) -> bool:
    """Says whether a product has no batch: positions times a table, say, as in a relative bias."""
    return not any("b" in ir.dim_vars(d) for d in eqn.outvars[0].aval.shape)
