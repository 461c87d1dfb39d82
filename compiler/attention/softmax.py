"""Find softmaxes in a graph, in the forms that people and libraries write them.

A softmax is exp(x) over its own sum, whatever was subtracted from x before: a shift that is the same along the axis
drops out, so it is left on the scores for whoever reads them. The sum is followed with axis labels from where it
divides up to what it sums, so that a sum that is spread back over another axis is no softmax.
"""

import dataclasses
from collections.abc import Mapping

from xlathe import jaxpr as ir
from xlathe.axes import Axes, Einsum, Labels, NoLabels
from xlathe.values import is_zero

Producer = Mapping[ir.Var, ir.JaxprEqn]

_KEEPS_SHAPE = frozenset({"convert_element_type", "copy", "stop_gradient", "optimization_barrier"})
_VIEWS = _KEEPS_SHAPE | {"broadcast_in_dim", "reshape", "expand_dims", "squeeze"}


@dataclasses.dataclass(frozen=True)
class Softmax:
    """probs = softmax(scores) along `axis`, possibly with weights on the exponentials.

    probs: the value to follow downstream: the probabilities, or the exponentials where the division comes after the
        product with the values; `division` then is that late division.
    total: the equation that sums the exponentials.
    keep: booleans that set an exponential to zero; factors: values that exponentials are multiplied by.
    masked_late: whether `keep` acts on the sum alone, so that the probabilities have to be masked by it as well.
    """

    probs: ir.Var
    scores: ir.Atom
    axis: int
    total: ir.JaxprEqn
    division: ir.JaxprEqn | None = None
    keep: tuple[ir.Atom, ...] = ()
    factors: tuple[ir.Atom, ...] = ()
    masked_late: bool = False


def find_softmaxes(jaxpr: ir.Jaxpr) -> tuple[list[Softmax], list[ir.JaxprEqn]]:
    """Returns exp(x) / sum(exp(x)), exp(x - logsumexp(x)), and quotients after the next product.

    Also returns the divisions of exponentials by a sum that is not their own.
    """
    finder = _Finder(ir.producers(jaxpr.eqns))
    found, strangers = [], []
    for eqn in jaxpr.eqns:
        anchor = None
        if eqn.primitive.name == "div":
            anchor = finder.quotient(eqn) or finder.late_quotient(eqn)
            if anchor is None and finder.divides_exponentials(eqn):
                strangers.append(eqn)
        elif eqn.primitive.name == "exp":
            anchor = finder.in_log_space(eqn)
        if anchor is not None:
            found.append(anchor)
    return found, strangers


@dataclasses.dataclass(frozen=True)
class _Exponentials:
    exp: ir.JaxprEqn
    keep: tuple[ir.Atom, ...] = ()
    factors: tuple[ir.Atom, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A sum over one axis, and the labels of what it sums; those of the summed axis are None."""

    eqn: ir.JaxprEqn
    axis: int
    labels: tuple[tuple[int, ...] | None, ...]


class _Finder:
    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self.axes = Axes()

    def quotient(self, div: ir.JaxprEqn) -> Softmax | None:
        """exp(x) / sum(exp(x))."""
        labels = self.axes.fresh_all(div.outvars[0].aval.shape)
        top, total = self._exponentials(div.invars[0]), self._sum_above(div.invars[1], labels)
        if top is None or total is None or not self._fits(total, labels):
            return None
        summed = self._exponentials(total.eqn.invars[0])
        masked_late = summed is not None and bool(summed.keep) and not top.keep
        if summed is None or summed != (dataclasses.replace(top, keep=summed.keep) if masked_late else top):
            return None
        return Softmax(
            div.outvars[0], top.exp.invars[0], total.axis, total.eqn, None, summed.keep, top.factors, masked_late
        )

    def late_quotient(self, div: ir.JaxprEqn) -> Softmax | None:
        """(exp(x) v) / sum(exp(x))."""
        labels = self.axes.fresh_all(div.outvars[0].aval.shape)
        total, product = self._sum_above(div.invars[1], labels), self._above(div.invars[0], labels, "dot_general")
        summed = self._exponentials(total.eqn.invars[0]) if total is not None else None
        if total is None or summed is None or product is None:
            return None
        dot, dot_labels = product
        for operand, own in zip(dot.invars, Einsum.of(dot).operand_labels(self.axes, dot, dot_labels), strict=True):
            if self._exponentials(operand) == summed and self._fits(total, own) and isinstance(operand, ir.Var):
                scores = summed.exp.invars[0]
                return Softmax(operand, scores, total.axis, total.eqn, div, summed.keep, summed.factors)
        return None

    def divides_exponentials(self, div: ir.JaxprEqn) -> bool:
        """Says whether exponentials are divided by a sum over an axis."""
        summed = self._made_by(self._through(div.invars[1]), "reduce_sum")
        return summed is not None and self._exponentials(div.invars[0]) is not None

    def in_log_space(self, exp: ir.JaxprEqn) -> Softmax | None:
        """exp(x - (log(sum(exp(x - m))) + m)), and exp(x - log(sum(exp(x)))) for any x."""
        labels = self.axes.fresh_all(exp.outvars[0].aval.shape)
        sub = self._made_by(self._through(exp.invars[0], _KEEPS_SHAPE), "sub")
        if sub is None or not isinstance(normalizer := sub.invars[1], ir.Var):
            return None
        logarithm = self._logarithm(normalizer, labels)
        if logarithm is None:
            return None
        log, log_labels, added = logarithm
        total = self._sum_above(log.invars[0], log_labels)
        inner = self._exponentials(total.eqn.invars[0]) if total is not None else None
        if total is None or inner is None or inner.keep or inner.factors or not self._fits(total, labels):
            return None
        if not self._same_logits(sub.invars[0], inner.exp.invars[0], added):
            return None
        return Softmax(exp.outvars[0], sub.invars[0], total.axis, total.eqn)

    def _logarithm(self, atom: ir.Atom, labels: Labels) -> tuple[ir.JaxprEqn, Labels, ir.Atom | None] | None:
        """Reads log(x) and log(x) + added."""
        above = self._above(atom, labels, "log", "add")
        if above is None or above[0].primitive.name == "log":
            return above and (*above, None)
        for term, added in (above[0].invars, above[0].invars[::-1]):
            log = self._above(term, above[1], "log")
            if log is not None:
                return (*log, added)
        return None

    def _same_logits(self, outer: ir.Atom, inner: ir.Atom, added: ir.Atom | None) -> bool:
        """Says whether `inner` is `outer`, or `outer - added` where something is added to the logarithm again."""
        if added is not None:
            shifted = self._made_by(self._through(inner, _KEEPS_SHAPE), "sub")
            if shifted is None or self._through(shifted.invars[1]) is not self._through(added):
                return False
            inner = shifted.invars[0]
        return self._through(inner, _KEEPS_SHAPE) is self._through(outer, _KEEPS_SHAPE)

    def _exponentials(self, atom: ir.Atom) -> _Exponentials | None:
        """Reads exp(x), where(keep, exp(x), 0) and exp(x) * factor, nested as they come."""
        atom = self._through(atom, _KEEPS_SHAPE)
        if (exp := self._made_by(atom, "exp")) is not None:
            return _Exponentials(exp)
        if (select := self._made_by(atom, "select_n")) is not None and is_zero(select.invars[1], self.producer):
            inner = self._exponentials(select.invars[2])
            return inner and dataclasses.replace(inner, keep=(*inner.keep, select.invars[0]))
        if (mul := self._made_by(atom, "mul")) is not None:
            for value, factor in (mul.invars, mul.invars[::-1]):
                if (inner := self._exponentials(value)) is not None:
                    return dataclasses.replace(inner, factors=(*inner.factors, factor))
        return None

    def _sum_above(self, atom: ir.Atom, labels: Labels) -> _Sum | None:
        """Walks up from a normalizer with these labels to the sum over one axis that it is."""
        above = self._above(atom, labels, "reduce_sum")
        if above is None or len(above[0].params["axes"]) != 1:
            return None
        (axis,) = above[0].params["axes"]
        return _Sum(above[0], axis, (*above[1][:axis], None, *above[1][axis:]))

    def _above(self, atom: ir.Atom, labels: Labels, *names: str) -> tuple[ir.JaxprEqn, Labels] | None:
        """Walks up through views to an equation with one of these names; returns it and its result's labels."""
        while (eqn := self._made_by(atom)) is not None and eqn.primitive.name not in names:
            try:
                # logsumexp takes the absolute value of the sum, which is positive
                positive = eqn.primitive.name == "abs" and "reduce_sum" in names
                upper = labels if positive else self.axes.backward(eqn, labels)
            except NoLabels:
                return None
            if upper is None:
                return None
            atom, labels = eqn.invars[0], upper
        return (eqn, labels) if eqn is not None else None

    def _fits(self, total: _Sum, labels: Labels) -> bool:
        """Says whether a sum belongs to values with these labels: the same axes, but for the summed one."""
        return len(labels) == len(total.labels) and all(
            theirs is None or self.axes.resolve(own) == self.axes.resolve(theirs)
            for own, theirs in zip(labels, total.labels, strict=True)
        )

    def _through(self, atom: ir.Atom, names: frozenset[str] = _VIEWS) -> ir.Atom:
        """Follows a value up through equations with these names."""
        while (eqn := self._made_by(atom)) is not None and eqn.primitive.name in names:
            atom = eqn.invars[0]
        return atom

    def _made_by(self, atom: ir.Atom, *names: str) -> ir.JaxprEqn | None:
        eqn = self.producer.get(atom) if isinstance(atom, ir.Var) else None
        return eqn if eqn is not None and (not names or eqn.primitive.name in names) else None
