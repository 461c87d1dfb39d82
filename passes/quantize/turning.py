"""A proof, equation by equation, that a model's results stay where its residual stream is turned.

Let Q be orthogonal. Turning an axis of a weight w multiplies it by Q along that axis: w'[.., j, ..] is the sum over i
of w[.., i, ..] Q[i, j]. What each value of the turned model is, by induction over the program: the plain model's
value, or that value turned along some axes. Sums of turned values are turned; a sum over an axis turned on both sides
of a product is what it was, since Q Q^T is 1, and so are sums of squares. An equation without such a rule is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import SAME_SHAPE, Axes, Einsum, NoLabels, grouped_sum
from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.layout_rules import ELEMENTWISE
from xlathe.values import is_zero, uniform_value

_SUMS = frozenset({"add", "sub", "add_any"})
_KEEPS = frozenset({"neg", "reduce_precision"}) | SAME_SHAPE
_VIEWS = frozenset({"transpose", "broadcast_in_dim", "squeeze", "expand_dims", "reshape"})
AxisSet = frozenset[int]
NONE: AxisSet = frozenset()


@dataclasses.dataclass(frozen=True)
class Value:
    """What a value of the turned model is to the plain model's.

    turned: the plain value multiplied by Q along these axes; the plain value itself where there are none.
    flat: of a plain value, the axes along which all elements are known to be equal.
    paired: only the sums over this axis are the plain value's.
    """

    turned: AxisSet = NONE
    flat: AxisSet = NONE
    paired: AxisSet = NONE

    @property
    def moved(self) -> AxisSet:
        return self.turned | self.paired


class _Refused(Exception):
    """Why an equation cannot take turned operands."""


def prove(graph: Graph, turned: Mapping[str, AxisSet], flat: frozenset[str]) -> None:
    """Proves that the results stay where these axes of weights are turned; flat: weights of one number.

    graph: without calls. Raises PassError with the operation and the line that no rule covers.
    """
    proof = _Proof(graph)
    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        axes = turned.get(item.name, NONE)
        if axes and not jnp.issubdtype(var.aval.dtype, jnp.floating):
            raise PassError(f"{item.name} is {var.aval.dtype}: weights are rotated before they are quantized")
        known = frozenset(range(var.aval.ndim)) if item.name in flat else NONE
        proof.values[var] = Value(axes, NONE if axes else known)
    for eqn in ir.live_equations(graph.jaxpr):
        try:
            results = proof.results(eqn)
        except (_Refused, NoLabels) as reason:
            raise PassError(f"{reason} at {ir.source_line(eqn)}") from None
        proof.values.update(zip(eqn.outvars, results, strict=True))
    if any(proof.value(out).moved for out in graph.jaxpr.outvars):
        raise PassError("the residual stream is a result of the model")


class _Proof:
    def __init__(self, graph: Graph) -> None:
        self.producer = ir.producers(graph.jaxpr.eqns)
        self.names = {v: i.name for i, v in zip(graph.inputs, graph.jaxpr.invars, strict=True)}
        self.values: dict[ir.Var, Value] = {}

    def value(self, atom: ir.Atom) -> Value:
        return Value() if isinstance(atom, ir.Literal) else self.values[atom]

    def results(self, eqn: ir.JaxprEqn) -> Sequence[Value]:
        operands = [self.value(atom) for atom in eqn.invars]
        if not any(operand.moved for operand in operands):
            return [Value(flat=self._flat(eqn, operands))] * len(eqn.outvars)
        name = eqn.primitive.name
        found = self._rule(name)(eqn, operands)
        dtypes = [v.aval.dtype for v in eqn.outvars]
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            raise _Refused(f"{name} makes {dtypes[0]} of the residual stream")
        return [found] * len(eqn.outvars)

    def _rule(self, name: str) -> Callable[[ir.JaxprEqn, list[Value]], Value]:
        if name in _SUMS:
            return self._sum
        if name in _KEEPS:
            return lambda eqn, operands: _only(eqn, operands)
        if name in _VIEWS:
            return self._view
        return getattr(self, f"_{name}", self._unknown)

    def _unknown(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        raise _Refused(f"{eqn.primitive.name} takes the residual stream, which an orthogonal matrix does not pass,")

    def _flat(self, eqn: ir.JaxprEqn, operands: list[Value]) -> AxisSet:
        """The axes along which the result of plain operands is known to be flat."""
        ndim, name = eqn.outvars[0].aval.ndim, eqn.primitive.name
        everywhere = frozenset(range(ndim))
        if name in ELEMENTWISE - {"bitcast_convert_type"}:
            known = (self._flat_in(a, o, ndim) for a, o in zip(eqn.invars, operands, strict=True))
            return everywhere.intersection(*known)
        if name not in _VIEWS:
            return NONE
        own = self._flat_in(eqn.invars[0], operands[0], eqn.invars[0].aval.ndim)
        if len(own) == eqn.invars[0].aval.ndim:
            return everywhere
        if name != "broadcast_in_dim":
            return NONE
        return everywhere - {to for i, to in enumerate(eqn.params["broadcast_dimensions"]) if i not in own}

    def _flat_in(self, atom: ir.Atom, value: Value, ndim: int) -> AxisSet:
        """The axes of a result of `ndim` axes along which an elementwise operand is flat, or spread."""
        if atom.aval.ndim == 0:
            return frozenset(range(ndim))
        return value.flat | {i for i, size in enumerate(atom.aval.shape) if ir.same_dim(size, 1)}

    def _sum(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        return self._alike(eqn, list(zip(eqn.invars, operands, strict=True)), is_zero)

    def _alike(
        self,
        eqn: ir.JaxprEqn,
        operands: Sequence[tuple[ir.Atom, Value]],
        passes: Callable[[ir.Atom, Mapping[ir.Var, ir.JaxprEqn]], bool],
    ) -> Value:
        """All operands are turned alike; those that `passes` names are what they were when turned."""
        found = {value for atom, value in operands if value.moved or not passes(atom, self.producer)}
        if len(found) != 1 or next(iter(found)).paired:
            plain = next((atom for atom, value in operands if not value.moved), operands[0][0])
            moved = next((atom for atom, value in operands if value.moved and atom is not plain), plain)
            stream = self._named(moved) if self._source(moved) in self.names else "the residual stream"
            what = f"{stream} and {self._named(plain)}, which is not rotated with it,"
            raise _Refused(f"{eqn.primitive.name} joins {what}")
        return found.pop()

    def _mul(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        if eqn.invars[0] is eqn.invars[1]:
            return self._square(eqn, operands)
        if all(operand.moved for operand in operands):
            raise _Refused(self._by_channel(eqn.invars))
        return self._scaled(eqn, operands, 0 if operands[0].moved else 1)

    def _div(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        if operands[1].moved:
            raise _Refused("div divides by the residual stream")
        return self._scaled(eqn, operands, 0)

    def _scaled(self, eqn: ir.JaxprEqn, operands: list[Value], side: int) -> Value:
        """A turned value by a plain one that is the same number for all channels."""
        value, other = operands[side], operands[1 - side]
        if other.moved or not value.moved <= self._flat_in(eqn.invars[1 - side], other, eqn.outvars[0].aval.ndim):
            raise _Refused(self._by_channel(eqn.invars[1 - side : 2 - side]))
        return value

    def _by_channel(self, atoms: Sequence[ir.Atom]) -> str:
        names = " and ".join(dict.fromkeys(map(self._named, atoms)))
        return f"the residual stream is scaled channel by channel, by {names}, which cannot be folded into weights,"

    def _square(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        if len(operands[0].turned) != 1:
            raise _Refused(f"{eqn.primitive.name} squares what is turned along several axes, or squared already,")
        return Value(paired=operands[0].turned)

    def _integer_pow(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        return self._square(eqn, operands) if eqn.params["y"] == 2 else self._unknown(eqn, operands)

    def _select_n(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        found = self._alike(eqn, list(zip(eqn.invars[1:], operands[1:], strict=True)), _is_zero_or_nan)
        if not found.turned <= self._flat_in(eqn.invars[0], operands[0], eqn.outvars[0].aval.ndim):
            raise _Refused("select_n chooses channel by channel from the residual stream")
        return found

    def _reduce_sum(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        (value,), axes = operands, set(eqn.params["axes"])
        if value.turned & axes:
            raise _Refused("reduce_sum adds up the channels of the residual stream, as a LayerNorm's mean does,")
        if value.paired:
            return Value() if value.paired <= axes else self._unknown(eqn, operands)
        return Value(frozenset(axis - sum(a < axis for a in axes) for axis in value.turned))

    def _dot_general(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        left, right = operands
        einsum, (_, batch) = Einsum.of(eqn), eqn.params["dimension_numbers"]
        if left.paired or right.paired or left.turned & {*batch[0]} or right.turned & {*batch[1]}:
            return self._unknown(eqn, operands)
        for i, j in einsum.contracted:
            if (i in left.turned) != (j in right.turned):
                plain = self._named(eqn.invars[1 if i in left.turned else 0])
                raise _Refused(f"dot_general sums the residual stream with {plain}, which is not rotated with it,")
        kept = [einsum.lhs[i] for i in left.turned] + [einsum.rhs[i] for i in right.turned]
        return Value(frozenset(axis for axis in kept if axis is not None))

    def _ragged_dot_general(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        rows, weights, *sizes = operands
        summed = grouped_sum(eqn)
        if summed is None or any(v.moved for v in sizes) or rows.paired or weights.paired or weights.turned & {0}:
            return self._unknown(eqn, operands)
        if rows.turned & {0} or (1 in rows.turned) != (summed in weights.turned):
            raise _Refused("ragged_dot_general sums what is rotated with what is not")
        return Value(frozenset({1}) if 3 - summed in weights.turned else NONE)

    def _gather(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        """Whole rows of a table: axes that are taken whole stay turned."""
        (table, index), numbers, shape = operands, eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
        sizes, fill = eqn.params["slice_sizes"], eqn.params["fill_value"]
        fits = fill is None or fill == 0 or math.isnan(fill)
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        whole = all(ir.same_dim(sizes[i], shape[i]) and i not in numbers.start_index_map for i in table.turned)
        if index.moved or table.paired or not whole or table.turned & {*gone} or not fits:
            return self._unknown(eqn, operands)
        places = dict(zip((i for i in range(len(shape)) if i not in gone), numbers.offset_dims, strict=True))
        return Value(frozenset(places[axis] for axis in table.turned))

    def _slice(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        if not all(ir.same_dim(before[i], after[i]) for i in operands[0].moved) or any(o.moved for o in operands[1:]):
            return self._unknown(eqn, operands)
        return operands[0]

    _dynamic_slice = _slice

    def _concatenate(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        found = self._alike(eqn, list(zip(eqn.invars, operands, strict=True)), lambda atom, producer: False)
        return self._unknown(eqn, operands) if eqn.params["dimension"] in found.turned else found

    def _split(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        return self._unknown(eqn, operands) if eqn.params["axis"] in operands[0].moved else operands[0]

    def _view(self, eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
        """A view leaves every turned axis one whole axis."""
        value, axes = _only(eqn, operands), Axes()
        labels = axes.fresh_all(eqn.invars[0].aval.shape)
        if eqn.primitive.name == "broadcast_in_dim":
            to = eqn.params["broadcast_dimensions"]
            return Value(*(frozenset(to[i] for i in moved) for moved in (value.turned, NONE, value.paired)))
        below = axes.forward(eqn, labels)
        if below is None:
            return self._unknown(eqn, operands)
        resolved = [axes.resolve(label) for label in below]
        wanted = [axes.resolve(labels[i]) for i in sorted(value.moved)]
        if not all(label and label in resolved for label in wanted):
            raise _Refused(f"{eqn.primitive.name} takes the channels of the residual stream apart")
        places = {i: resolved.index(label) for i, label in zip(sorted(value.moved), wanted, strict=True)}
        return Value(*(frozenset(places[i] for i in moved) for moved in (value.turned, NONE, value.paired)))

    def _named(self, atom: ir.Atom) -> str:
        """Returns the name of the input that a value is a view of, or what makes it."""
        source = self._source(atom)
        if isinstance(source, ir.Literal):
            return "a number"
        return self.names[source] if source in self.names else f"the result of {self.producer[source].primitive.name}"

    def _source(self, atom: ir.Atom) -> ir.Atom:
        """Returns what a value is a view of."""
        while isinstance(atom, ir.Var) and (eqn := self.producer.get(atom)) is not None:
            if eqn.primitive.name not in _VIEWS | SAME_SHAPE:
                break
            atom = eqn.invars[0]
        return atom


def _only(eqn: ir.JaxprEqn, operands: list[Value]) -> Value:
    if len(operands) != 1:
        raise _Refused(f"{eqn.primitive.name} of several values takes the residual stream")
    return operands[0]


def _is_zero_or_nan(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> bool:
    value = uniform_value(atom, producer)
    return value is not None and (value == 0 or math.isnan(float(value)))
