"""Follow the scores of a softmax up to the product of queries and keys, and collect what acts on them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.attention.softmax import Softmax
from xlathe.axes import Axes, Label, Labels, NoLabels
from xlathe.layout_rules import ELEMENTWISE
from xlathe.masks import MASKED_BELOW
from xlathe.values import is_non_negative, is_zero, uniform_value

BELOW_ANY_BIAS = -1e8  # a fill at or below this hides a key whatever bias is added to it


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

    kind: `mask` (kept where it equals `keep_when`, `fill` elsewhere), `bias` (added, times `factor`) or `weight`
    (multiplies the exponentials: its logarithm is a bias).
    """

    value: Value
    kind: Literal["mask", "bias", "weight"]
    keep_when: bool = True
    fill: float = float("-inf")
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` of queries and keys, the labels of its result, and what it is multiplied by."""

    eqn: ir.JaxprEqn
    labels: Labels
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scores:
    """softcap(sum of `products` * scale) and the terms upon it."""

    products: tuple[Product, ...]
    terms: tuple[Term, ...]
    scale: float
    softcap: float | None


class ScoresWalk:
    """One walk from a softmax up to the product of queries and keys."""

    def __init__(self, anchor: Softmax, axes: Axes, producer: Mapping[ir.Var, ir.JaxprEqn], keys: Label) -> None:
        self.anchor, self.axes, self.producer, self.keys = anchor, axes, producer, keys
        self.holds: dict[ir.Var, bool] = {}
        self.terms: list[Term] = []
        self.added: list[Product] = []

    def run(self, labels: Labels) -> Scores:
        """Raises Miss at the first equation that attention's scores do not go through."""
        scale, softcap, atom = 1.0, None, self.anchor.scores
        for mask in self.anchor.keep:
            self._add(Term(Value(mask, labels), "mask"))
        for weight in self.anchor.factors:
            if not is_non_negative(weight, self.producer):
                raise Miss("exponentials are multiplied by something that may be negative", self.anchor.total)
            self._add(Term(Value(weight, labels), "weight"))
        while True:
            eqn = self.producer.get(atom) if isinstance(atom, ir.Var) else None
            if eqn is None:
                raise Miss("no product of queries and keys before the softmax", self.anchor.total)
            name = eqn.primitive.name
            if name == "dot_general":
                added = (dataclasses.replace(product, factor=product.factor / scale) for product in self.added)
                return Scores((Product(eqn, labels), *added), self._consistent(), scale, softcap)
            if softcap is not None and name in ("add", "sub", "select_n"):
                raise Miss(f"{name} on the scores before the soft-cap", eqn)
            if name in ("mul", "div"):
                number, atom = self._scaled(eqn)
                scale *= number
            elif name in ("add", "sub"):
                atom = self._shifted(eqn, labels) or self._biased(eqn, labels, scale)
            elif name == "select_n":
                atom, mask, keep_when, fill = self._masked(eqn, scale)
                self._add(Term(Value(mask, labels), "mask", keep_when=keep_when, fill=fill))
            elif name == "tanh" and softcap is None and scale > 0:
                softcap, atom = scale, eqn.invars[0]  # c tanh(x / c): the inner factor multiplies c
            else:
                atom, labels = self._view(eqn, labels)

    def _view(self, eqn: ir.JaxprEqn, labels: Labels) -> tuple[ir.Atom, Labels]:
        if eqn.primitive.name == "convert_element_type" and not widens(eqn):
            before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            raise Miss(f"a cast from {before} to {after} between the product and the softmax", eqn)
        upper = self.axes.backward(eqn, labels)
        if upper is None:
            raise Miss(f"{eqn.primitive.name} between the product and the softmax", eqn)
        return eqn.invars[0], upper

    def _add(self, term: Term) -> None:
        """Adds a term in its smallest form; a sum becomes a term for each side, and a shift of a row nothing."""
        if isinstance(term.value.var, ir.Literal):
            if term.kind != "bias":
                raise Miss(f"a {term.kind} that is a number", self.anchor.total)
            return
        value = strip(term.value if term.value.var.aval.ndim else Value(term.value.var, ()), self.axes, self.producer)
        eqn = self.producer.get(value.var)
        if term.kind == "bias" and not self._varies(value.var, value.labels):
            return
        if term.kind == "bias" and eqn is not None and eqn.primitive.name in ("add", "sub"):
            for atom, sign in zip(eqn.invars, (1.0, 1.0 if eqn.primitive.name == "add" else -1.0), strict=True):
                self._add(dataclasses.replace(term, value=Value(atom, value.labels), factor=term.factor * sign))
            return
        is_product = eqn is not None and eqn.primitive.name == "dot_general" and not _is_static_product(eqn)
        if term.kind == "bias" and eqn is not None and is_product:
            self.added.append(Product(eqn, value.labels, term.factor))
            return
        self.terms.append(self._as_mask(dataclasses.replace(term, value=value), eqn))

    def _as_mask(self, term: Term, eqn: ir.JaxprEqn | None) -> Term:
        """Reads an added where(seen, 0, -1e9) as the mask that it is."""
        while eqn is not None and eqn.primitive.name == "convert_element_type":
            eqn = self.producer.get(eqn.invars[0]) if widens(eqn) else None
        if term.kind != "bias" or eqn is None or eqn.primitive.name != "select_n" or len(eqn.invars) != 3:
            return term
        mask, *cases = eqn.invars
        for fill, zero, keep_when in ((cases[0], cases[1], True), (cases[1], cases[0], False)):
            value = uniform_value(fill, self.producer)
            hides = value is not None and float(value) * term.factor <= BELOW_ANY_BIAS
            if value is not None and hides and is_zero(zero, self.producer):
                stripped = strip(Value(mask, term.value.labels if mask.aval.ndim else ()), self.axes, self.producer)
                return Term(stripped, "mask", keep_when, float(value) * term.factor)
        return term

    def _consistent(self) -> tuple[Term, ...]:
        """Returns the terms; a mask's fill has to hide a key whatever bias is added as well."""
        masks, others = [t for t in self.terms if t.kind == "mask"], [t for t in self.terms if t.kind != "mask"]
        for mask in masks:
            if (others or self.added) and mask.fill > BELOW_ANY_BIAS:
                what = "a bias" if others else "another product"
                raise Miss(f"a mask of {mask.fill:g} beside {what}, which may outweigh it", self.anchor.total)
        return tuple(self.terms)

    def _varies(self, value: ir.Atom, labels: Labels) -> bool:
        """Says whether a value may differ from key to key."""
        stack = [(value, labels)]
        while stack:
            atom, labels = stack.pop()
            keys = set(self.axes.resolve(self.keys))
            if isinstance(atom, ir.Literal) or not keys & {a for label in labels for a in self.axes.resolve(label)}:
                continue
            eqn = self.producer.get(atom)
            if eqn is None:
                return True
            if eqn.primitive.name in ELEMENTWISE:
                stack += [(a, of_operand(a, labels)) for a in eqn.invars if a.aval.ndim]
                continue
            try:
                upper = self.axes.backward(eqn, labels)
            except NoLabels:
                return True
            if upper is None:
                return True
            stack.append((eqn.invars[0], upper))
        return False

    def _scaled(self, eqn: ir.JaxprEqn) -> tuple[float, ir.Atom]:
        left, right = eqn.invars
        for value, scores in ((right, left), (left, right)):
            number = uniform_value(value, self.producer)
            if number is None or (value is left and eqn.primitive.name == "div"):
                continue
            if float(number) == 0 or not math.isfinite(float(number)):
                raise Miss(f"{eqn.primitive.name} of the scores by {float(number)}", eqn)
            return (1 / float(number) if eqn.primitive.name == "div" else float(number)), scores
        by = "the total length" if self._uses_length(eqn) else "something that is not one number"
        raise Miss(f"{eqn.primitive.name} of the scores by {by}", eqn)

    def _uses_length(self, eqn: ir.JaxprEqn) -> bool:
        """Says whether a factor is a number made from the length."""
        makers = [self.producer[a] for a in eqn.invars if isinstance(a, ir.Var) and a in self.producer]
        scalars = [m for m in makers if all(not x.aval.ndim for x in m.invars)]
        return any(m.primitive.name == "dim_as_value" or self._uses_length(m) for m in scalars)

    def _shifted(self, eqn: ir.JaxprEqn, labels: Labels) -> ir.Atom | None:
        """Returns the other side where one is the same on every key, which softmax ignores."""
        left, right = eqn.invars
        if not self._varies(right, of_operand(right, labels)):
            return left
        return right if eqn.primitive.name == "add" and not self._varies(left, of_operand(left, labels)) else None

    def _biased(self, eqn: ir.JaxprEqn, labels: Labels, scale: float) -> ir.Atom:
        """Returns the side that holds the product, and adds the other one as a bias."""
        left, right = eqn.invars
        if self._holds_product(left):
            sign = 1.0 if eqn.primitive.name == "add" else -1.0
            self._add(Term(Value(right, labels), "bias", factor=sign * scale))
            return left
        if self._holds_product(right) and eqn.primitive.name == "add":
            self._add(Term(Value(left, labels), "bias", factor=scale))
            return right
        raise Miss("a sum in which no side is a product of queries and keys", eqn)

    def _holds_product(self, atom: ir.Atom) -> bool:
        """Says whether a value is a dot product under operations that scores go through."""
        eqn = self.producer.get(atom) if isinstance(atom, ir.Var) else None
        if eqn is None:
            return False
        if eqn.outvars[0] not in self.holds:
            self.holds[eqn.outvars[0]] = self._makes_product(eqn)
        return self.holds[eqn.outvars[0]]

    def _makes_product(self, eqn: ir.JaxprEqn) -> bool:
        name = eqn.primitive.name
        if name == "dot_general":
            return not _is_static_product(eqn)
        if name in ("add", "sub", "mul", "div"):
            return any(self._holds_product(a) for a in eqn.invars)
        if name == "select_n":
            return any(self._holds_product(a) for a in eqn.invars[1:])
        is_view = self.axes.backward(eqn, self.axes.fresh_all(eqn.outvars[0].aval.shape)) is not None
        return (is_view or name in ("tanh", "reduce_precision")) and self._holds_product(eqn.invars[0])

    def _masked(self, eqn: ir.JaxprEqn, scale: float) -> tuple[ir.Atom, ir.Atom, bool, float]:
        if len(eqn.invars) != 3:
            raise Miss("a select of more than two cases on the scores", eqn)
        mask, when_false, when_true = eqn.invars
        for fill, scores, keep_when in ((when_false, when_true, True), (when_true, when_false, False)):
            value = uniform_value(fill, self.producer)
            if value is not None and float(value) * scale <= MASKED_BELOW:
                return scores, mask, keep_when, float(value) * scale
        raise Miss("a select on the scores without a large negative fill", eqn)


def of_operand(atom: ir.Atom, labels: Labels) -> Labels:
    """Returns an elementwise operand's labels from those of the result: scalars and axes of size 1 are repeated."""
    if not atom.aval.ndim:
        return ()
    return tuple(() if ir.same_dim(n, 1) else label for n, label in zip(atom.aval.shape, labels, strict=True))


def strip(value: Value, axes: Axes, producer: Mapping[ir.Var, ir.JaxprEqn]) -> Value:
    """Walks up through views that cost nothing to redo; dtypes stay."""
    var, labels = value.var, of_operand(value.var, value.labels)
    while (eqn := producer.get(var)) is not None and eqn.primitive.name != "convert_element_type":
        upper = axes.above(eqn, labels)
        if upper is None:
            break
        var, labels = upper
    return Value(var, labels)


def widens(eqn: ir.JaxprEqn) -> bool:
    """Says whether a cast is from a float to one that holds all its values."""
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    floats = jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating)
    return floats and jnp.promote_types(before, after) == after


def _is_static_product(eqn: ir.JaxprEqn) -> bool:
    """Says whether a product has no batch: positions times a table, say, as in a relative bias."""
    return not any("b" in ir.dim_vars(d) for d in eqn.outvars[0].aval.shape)
