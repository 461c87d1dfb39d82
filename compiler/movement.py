"""Where the elements of a value come from, when operations only move them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.layouts import Layout
from xlathe.values import constant

_MOVES = """
broadcast_in_dim concatenate copy copy_p expand_dims reshape rev slice split squeeze stack stop_gradient tile
transpose unstack
"""
MOVES = frozenset(_MOVES.split())
_INDEXED = frozenset({"gather", "dynamic_slice"})  # a slice, where the index is a number in the program

_ONE_TOKEN = {"b": 1, "t": 1}


@dataclasses.dataclass(frozen=True)
class Origins:
    """The elements of one token of a value.

    sources: values that something else than a move has made; which, index: int, of the shape that the value has for one
    token: the number of the source, and the place among the source's elements for one token. A number that stands in
    the program has no source: -1.
    """

    sources: tuple[ir.Var, ...]
    which: np.ndarray
    index: np.ndarray


def find_origins(value: ir.Var, producer: Mapping[ir.Var, ir.JaxprEqn]) -> Origins:
    """Sends numbers through the moves above a value."""
    sources: list[ir.Var] = []
    known: dict[ir.Var, Any] = {}
    starts = [0]

    def numbers(atom: ir.Atom) -> Any:
        if isinstance(atom, ir.Literal):
            return np.full(np.shape(atom.val), -1, np.int32)
        if atom not in known:
            eqn = producer.get(atom)
            index = _index(eqn, producer)
            if eqn is not None and (eqn.primitive.name in MOVES or index):
                moved = (numbers(a) for a in eqn.invars[: len(eqn.invars) - len(index)])
                known.update(zip(eqn.outvars, ir.bind_at(eqn, [*moved, *index], _ONE_TOKEN), strict=True))
            else:
                shape = ir.substitute(tuple(atom.aval.shape), _ONE_TOKEN)
                sources.append(atom)
                known[atom] = np.arange(starts[-1], starts[-1] + np.prod(shape), dtype=np.int32).reshape(shape)
                starts.append(starts[-1] + known[atom].size)
        return known[atom]

    with jax.ensure_compile_time_eval():
        found = np.asarray(numbers(value))
    which = np.searchsorted(starts, found, side="right") - 1
    return Origins(tuple(sources), which, found - np.asarray(starts)[which])


def _index(eqn: ir.JaxprEqn | None, producer: Mapping[ir.Var, ir.JaxprEqn]) -> list[Any]:
    """Returns the index operands of an equation that takes a slice at a known place, else none."""
    if eqn is None or eqn.primitive.name not in _INDEXED:
        return []
    values = [constant(atom, producer) for atom in eqn.invars[1:]]
    return [] if any(value is None for value in values) else values


def by_token(value: jax.Array, layout: Layout, rows: Any, length: Any) -> jax.Array:
    """Arranges a value as [rows, length, features], in the order that `Origins.index` counts features.

    layout: holds the batch and the tokens once each, and static sizes (`holds_tokens`).
    """
    sizes = {"b": rows, "t": length}
    factors = [factor for axis in layout.axes for factor in axis]
    apart = value.reshape([sizes[f] if isinstance(f, str) else f for f in factors])
    return jnp.moveaxis(apart, (factors.index("b"), factors.index("t")), (0, 1)).reshape(rows, length, -1)


def holds_tokens(layout: Layout) -> bool:
    """Says whether a value has a place for every token of every row, and none but static axes beside them."""
    factors = [factor for axis in layout.axes for factor in axis]
    return sorted(f for f in factors if isinstance(f, str)) == ["b", "t"] and all(
        isinstance(f, str | int) for f in factors
    )
