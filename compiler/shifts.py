"""Prove that the length, used as a number, only shifts the scores of a query, which softmax does not see."""

import enum
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.layout_rules import ELEMENTWISE

Producers = Mapping[ir.Var, ir.JaxprEqn]
Operand = tuple[ir.Atom, int | None]  # and which of its axes the positions are on: None where it does not vary
_SUMS = frozenset({"add", "sub", "neg"})
_KEEPS_VALUES = frozenset({"copy", "broadcast_in_dim", "transpose", "reshape"})


class LengthUse(enum.Enum):
    """How a value depends on the length, along one axis."""

    FREE = "not at all"
    SHIFT = "by a number that is the same along the axis"
    OTHER = "in a way that is not known"


def only_shifts(producer: Producers, atom: ir.Atom, axis: int) -> bool:
    """Says whether the length, used as a number in `atom`, only adds the same to all elements along `axis`.

    A sound proof by structure: sums of something free of the length and something that does not vary along the axis,
    in numbers that neither wrap around nor lose the difference between neighbors.
    """
    return _length_use(producer, (atom, axis)) is not LengthUse.OTHER


def _length_use(producer: Producers, operand: Operand) -> LengthUse:
    atom, axis = operand
    eqn = producer.get(atom) if isinstance(atom, ir.Var) else None
    if eqn is None:
        return LengthUse.FREE
    if eqn.primitive.name == "dim_as_value":
        return LengthUse.SHIFT if "t" in ir.dim_vars(eqn.params["dim"]) else LengthUse.FREE
    operands = _operands(eqn, axis)
    if operands is None:
        free = all(_length_use(producer, (a, None)) is LengthUse.FREE for a in eqn.invars)
        return LengthUse.FREE if free else LengthUse.OTHER
    uses = [_length_use(producer, o) for o in operands]
    if all(use is LengthUse.FREE for use in uses):
        return LengthUse.FREE
    if all(i is None for _, i in operands):
        return LengthUse.SHIFT  # whatever it is, it does not vary along the axis
    return LengthUse.SHIFT if _keeps_shift(producer, eqn, operands, uses) else LengthUse.OTHER


def _operands(eqn: ir.JaxprEqn, axis: int | None) -> list[Operand] | None:
    """Returns the operands of an equation that keeps places apart, None for any other."""
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return [(a, axis if axis is not None and _is_long(a, axis) else None) for a in eqn.invars]
    if name not in _KEEPS_VALUES:
        return None
    if axis is None:
        return [(eqn.invars[0], None)]
    if name == "transpose":
        return [(eqn.invars[0], eqn.params["permutation"][axis])]
    if name == "broadcast_in_dim":
        source = {d: i for i, d in enumerate(eqn.params["broadcast_dimensions"])}.get(axis)
        return [(eqn.invars[0], source if source is not None and _is_long(eqn.invars[0], source) else None)]
    source = _reshaped_axis(eqn, axis)
    return None if source is None else [(eqn.invars[0], source)]


def _keeps_shift(producer: Producers, eqn: ir.JaxprEqn, operands: Sequence[Operand], uses: Sequence[LengthUse]) -> bool:
    """Says whether the result of shifted operands is shifted."""
    if LengthUse.OTHER in uses or not all(map(_holds_differences, (*(a for a, _ in operands), eqn.outvars[0]))):
        return False
    name = eqn.primitive.name
    if name in _SUMS | _KEEPS_VALUES:
        return True
    if name == "convert_element_type":
        return not (_is_float(operands[0][0]) and not _is_float(eqn.outvars[0]))
    if name == "mul" or (name == "div" and _is_float(eqn.outvars[0])):
        return _is_scaled(producer, operands, uses, reverse=name == "mul")
    return False


def _holds_differences(atom: ir.Var | ir.Literal) -> bool:
    """Says whether sums of positions neither wrap around nor are rounded coarsely in an atom's dtype."""
    dtype = atom.aval.dtype
    signed = jnp.issubdtype(dtype, jnp.signedinteger) or _is_float(atom)
    return bool(signed and np.dtype(dtype).itemsize >= 4)


def _is_float(atom: ir.Var | ir.Literal) -> bool:
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.floating))


def _is_scaled(producer: Producers, operands: Sequence[Operand], uses: Sequence[LengthUse], reverse: bool) -> bool:
    """A shift times a factor stays a shift where the factor is free of the length and the same along the axis."""
    for factor in (0, 1) if reverse else (1,):
        if uses[factor] is LengthUse.FREE and not _varies(producer, operands[factor]):
            return True
    return False


def _varies(producer: Producers, operand: Operand) -> bool:
    """Says whether a value may vary along an axis."""
    atom, axis = operand
    if axis is None or isinstance(atom, ir.Literal):
        return False
    eqn = producer.get(atom)
    operands = None if eqn is None else _operands(eqn, axis)
    return operands is None or any(_varies(producer, o) for o in operands)


def _is_long(atom: ir.Atom, axis: int) -> bool:
    """Says whether an operand has the position axis: scalars and axes of size 1 are spread over it."""
    return atom.aval.ndim > 0 and ir.is_symbolic(atom.aval.shape[axis])


def _reshaped_axis(eqn: ir.JaxprEqn, axis: int) -> int | None:
    """Returns the operand axis that a position axis of a reshape comes from: they keep their order."""
    before, after = (
        [i for i, n in enumerate(aval.shape) if "t" in ir.dim_vars(n)]
        for aval in (eqn.invars[0].aval, eqn.outvars[0].aval)
    )
    return before[after.index(axis)] if axis in after and len(before) == len(after) else None
