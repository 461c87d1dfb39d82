"""Values that are known without running the model: numbers, and arrays that hold one number."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from xlathe import jaxpr as ir

_SPREADS = frozenset({"broadcast_in_dim", "reshape", "copy", "stop_gradient", "squeeze", "expand_dims", "transpose"})
_ARITHMETIC = frozenset({"convert_element_type", "mul", "div", "add", "sub", "neg", "sqrt", "rsqrt", "integer_pow",
                         "pow", "exp", "exp2", "log", "max", "min", "square"})  # fmt: skip

_NEVER_NEGATIVE = frozenset({"exp", "exp2", "logistic", "abs", "square", "iota"})
_KEEPS_SIGN = _SPREADS | {"convert_element_type", "mul", "div", "add", "max", "min", "sqrt", "select_n"}


def uniform_value(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> np.generic | None:
    """Returns the one number that a value holds in all its elements, if it can be read off the graph."""
    if isinstance(atom, ir.Literal):
        array = np.asarray(atom.val)
        return array.reshape(-1)[0] if array.size == 1 else None
    eqn = producer.get(atom)
    if eqn is None:
        return None
    if eqn.primitive.name in _SPREADS:
        return uniform_value(eqn.invars[0], producer)
    if eqn.primitive.name not in _ARITHMETIC:
        return None
    operands = [uniform_value(a, producer) for a in eqn.invars]
    if any(value is None for value in operands):
        return None
    params = {"sharding": None} if "sharding" in eqn.params else {}
    return np.asarray(ir.run(eqn, operands, **params)[0]).reshape(-1)[0]


def constant(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> Any:
    """Returns a value that follows from the numbers in the program alone, else None."""
    known: dict[ir.Var, Any] = {}

    def value(atom: ir.Atom) -> Any:
        if isinstance(atom, ir.Literal):
            return atom.val
        if atom not in known:
            known[atom] = made(atom)
        return known[atom]

    def made(var: ir.Var) -> Any:
        eqn = producer.get(var)
        if eqn is None or any(map(ir.is_symbolic, var.aval.shape)) or eqn.primitive.name == "dim_as_value":
            return None
        operands = [value(a) for a in eqn.invars]
        return None if any(o is None for o in operands) else ir.bind(eqn, operands)[eqn.outvars.index(var)]

    return value(atom)


def is_zero(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> bool:
    """Says whether a value is known to be zero everywhere."""
    value = uniform_value(atom, producer)
    return value is not None and bool(value == 0)


def is_non_negative(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> bool:
    """Says whether no element of a value can be below zero, by the operations that make it."""
    value = uniform_value(atom, producer)
    if value is not None:
        return float(value) >= 0
    if atom.aval.dtype == bool:
        return True
    eqn = producer.get(atom) if isinstance(atom, ir.Var) else None
    if eqn is None:
        return False
    if eqn.primitive.name == "integer_pow" and eqn.params["y"] % 2 == 0:
        return True
    if eqn.primitive.name in _NEVER_NEGATIVE:
        return True
    operands = eqn.invars[1:] if eqn.primitive.name == "select_n" else eqn.invars
    return eqn.primitive.name in _KEEPS_SIGN and all(is_non_negative(a, producer) for a in operands)
