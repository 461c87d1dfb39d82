"""Find softmaxes in a graph, in the forms that people and libraries write them."""

import dataclasses
from collections.abc import Mapping

from xlathe import jaxpr as ir
from xlathe.values import uniform_value

Producer = Mapping[ir.Var, ir.JaxprEqn]

_KEEPS_SHAPE = frozenset({"convert_element_type", "copy", "stop_gradient", "optimization_barrier"})
_VIEWS = _KEEPS_SHAPE | {"broadcast_in_dim", "reshape", "expand_dims", "squeeze", "abs"}
_MOVES = _VIEWS | {"transpose"}


@dataclasses.dataclass(frozen=True)
class Softmax:
    """probs = softmax(scores) along `axis`, possibly with weights on the exponentials.

    probs: the value to follow downstream: the probabilities, or the exponentials where the division comes after the
        product with the values; `division` then is that late division.
    total: the equation that sums the exponentials.
    keep: booleans that set an exponential to zero; factors: non-negative values that exponentials are multiplied by.
    """

    probs: ir.Var
    scores: ir.Atom
    axis: int
    total: ir.JaxprEqn
    division: ir.JaxprEqn | None = None
    keep: tuple[ir.Atom, ...] = ()
    factors: tuple[ir.Atom, ...] = ()


def find_softmaxes(jaxpr: ir.Jaxpr) -> list[Softmax]:
    """Returns exp(x - m) / sum(exp(x - m)), exp(x - logsumexp(x)), and quotients after the next product."""
    producer = ir.producers(jaxpr.eqns)
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "div":
            anchor = _quotient(eqn, producer) or _late_quotient(eqn, producer)
        elif eqn.primitive.name == "exp":
            anchor = _in_log_space(eqn, producer)
        else:
            continue
        if anchor is not None:
            found.append(anchor)
    return found


def through(atom: ir.Atom, producer: Producer, names: frozenset[str] = _VIEWS) -> ir.Atom:
    """Follows a value up through equations with these names."""
    while isinstance(atom, ir.Var) and atom in producer and producer[atom].primitive.name in names:
        atom = producer[atom].invars[0]
    return atom


def _made_by(atom: ir.Atom, producer: Producer, *names: str) -> ir.JaxprEqn | None:
    eqn = producer.get(atom) if isinstance(atom, ir.Var) else None
    return eqn if eqn is not None and eqn.primitive.name in names else None


@dataclasses.dataclass(frozen=True)
class _Exponentials:
    exp: ir.JaxprEqn
    keep: tuple[ir.Atom, ...] = ()
    factors: tuple[ir.Atom, ...] = ()


def _exponentials(atom: ir.Atom, producer: Producer) -> _Exponentials | None:
    """Reads exp(x), where(keep, exp(x), 0) and exp(x) * factor, nested as they come."""
    atom = through(atom, producer, _KEEPS_SHAPE)
    if (exp := _made_by(atom, producer, "exp")) is not None:
        return _Exponentials(exp)
    if (select := _made_by(atom, producer, "select_n")) is not None and is_zero(select.invars[1], producer):
        inner = _exponentials(select.invars[2], producer)
        return inner and dataclasses.replace(inner, keep=(*inner.keep, select.invars[0]))
    if (mul := _made_by(atom, producer, "mul")) is not None:
        for value, factor in (mul.invars, mul.invars[::-1]):
            if (inner := _exponentials(value, producer)) is not None:
                return dataclasses.replace(inner, factors=(*inner.factors, factor))
    return None


def _quotient(div: ir.JaxprEqn, producer: Producer) -> Softmax | None:
    total = _made_by(through(div.invars[1], producer), producer, "reduce_sum")
    top = _exponentials(div.invars[0], producer)
    if total is None or top is None or len(total.params["axes"]) != 1:
        return None
    summed = _exponentials(total.invars[0], producer)
    if summed is None or summed.exp is not top.exp or summed.factors != top.factors:
        return None
    # a mask in the sum alone (jax.nn.softmax(where=)) is applied to the quotient again, further down
    return Softmax(
        div.outvars[0], _unshifted(top.exp.invars[0], producer), total.params["axes"][0], total, None,
        summed.keep or top.keep, top.factors,
    )  # fmt: skip


def _late_quotient(div: ir.JaxprEqn, producer: Producer) -> Softmax | None:
    total = _made_by(through(div.invars[1], producer, _MOVES), producer, "reduce_sum")
    product = _made_by(through(div.invars[0], producer, _MOVES), producer, "dot_general")
    if total is None or product is None or len(total.params["axes"]) != 1:
        return None
    summed = _exponentials(total.invars[0], producer)
    for operand in product.invars:
        top = _exponentials(operand, producer)
        if top is not None and top == summed and isinstance(operand, ir.Var):
            scores = _unshifted(top.exp.invars[0], producer)
            return Softmax(operand, scores, total.params["axes"][0], total, div, top.keep, top.factors)
    return None


def _in_log_space(exp: ir.JaxprEqn, producer: Producer) -> Softmax | None:
    """exp(x - (log(sum(exp(x - m))) + m)), and exp((x - m) - log(sum(exp(x - m))))."""
    sub = _made_by(through(exp.invars[0], producer, _KEEPS_SHAPE), producer, "sub")
    if sub is None:
        return None
    normalizer = through(sub.invars[1], producer)
    added = _made_by(normalizer, producer, "add")
    for candidate in [through(a, producer) for a in added.invars] if added is not None else [normalizer]:
        log = _made_by(candidate, producer, "log")
        total = _made_by(through(log.invars[0], producer), producer, "reduce_sum") if log is not None else None
        inner = _exponentials(total.invars[0], producer) if total is not None else None
        if inner is None or total is None or len(total.params["axes"]) != 1 or inner.keep or inner.factors:
            continue
        scores = _unshifted(sub.invars[0], producer)
        if _unshifted(inner.exp.invars[0], producer) is scores:
            return Softmax(exp.outvars[0], scores, total.params["axes"][0], total)
    return None


def is_zero(atom: ir.Atom, producer: Producer) -> bool:
    """Says whether a value is known to be zero everywhere."""
    value = uniform_value(atom, producer)
    return value is not None and float(value) == 0.0


def _unshifted(atom: ir.Atom, producer: Producer) -> ir.Atom:
    """Drops `- max(x)`: a value that was reduced over the softmax axis is a free shift."""
    sub = _made_by(through(atom, producer, _KEEPS_SHAPE), producer, "sub")
    if sub is None or not _is_maximum(sub.invars[1], producer):
        return atom
    return sub.invars[0]


def _is_maximum(atom: ir.Atom, producer: Producer) -> bool:
    """Says whether a value comes from a `reduce_max`, through `max(-inf, .)` and a guard for infinities."""
    eqn = _made_by(through(atom, producer), producer, "reduce_max", "max", "select_n")
    if eqn is None or eqn.primitive.name == "reduce_max":
        return eqn is not None
    return any(_is_maximum(a, producer) for a in eqn.invars)
