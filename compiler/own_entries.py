"""Pair the axes of a look-up in which every row, or token, reads its own entries.

`x[jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None], chosen]` says by two counting indices that row i and
token j read from row i and token j. The same look-up with paired axes (`operand_batching_dims` of a gather) needs no
such index, so that nothing in it depends on where a token stands.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import lax

from xlathe import jaxpr as ir
from xlathe.rewrite import Replacement, rewrite

_MOVES = frozenset({"convert_element_type", "copy"})


def pair_own_entries(jaxpr: ir.Jaxpr) -> tuple[ir.Jaxpr, int]:
    """Returns the program with such look-ups paired, and how many there were."""
    producer = ir.producers(jaxpr.eqns)
    found = {e.outvars[0]: r for e in jaxpr.eqns if e.primitive.name == "gather" and (r := _paired(e, producer))}
    return (rewrite(jaxpr, found), len(found)) if found else (jaxpr, 0)


def _paired(eqn: ir.JaxprEqn, producer: Mapping[ir.Var, ir.JaxprEqn]) -> Replacement | None:
    """Returns the look-up with every counting index in place of which an axis can be paired."""
    table, index = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    columns = _columns(index, producer)
    if columns is None or isinstance(table, ir.Literal) or len(columns) != len(numbers.start_index_map):
        return None
    pairs: dict[int, int] = {}  # axis of the table -> axis of the index
    for axis, column in zip(numbers.start_index_map, columns, strict=True):
        counted = _counted(column, producer)
        free = counted is not None and counted not in (*pairs.values(), *numbers.start_indices_batching_dims)
        if free and axis in numbers.collapsed_slice_dims and _same_size(table, axis, index, counted):
            assert counted is not None
            pairs[axis] = counted
    left = [i for i, axis in enumerate(numbers.start_index_map) if axis not in pairs]
    if not pairs or not left:
        return None
    batching = {**dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)), **pairs}
    paired = numbers._replace(
        collapsed_slice_dims=tuple(a for a in numbers.collapsed_slice_dims if a not in pairs),
        start_index_map=tuple(numbers.start_index_map[i] for i in left),
        operand_batching_dims=tuple(sorted(batching)),
        start_indices_batching_dims=tuple(batching[a] for a in sorted(batching)),
    )
    kept = [columns[i] for i in left]

    def emit(entries: Any, *indices: Any) -> Any:
        return ir.bind(eqn, [entries, lax.concatenate(indices, index.aval.ndim - 1)], dimension_numbers=paired)[0]

    return Replacement((table, *kept), emit)


def _columns(index: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> list[ir.Var] | None:
    """Returns the indices [.., 1] that a concatenation along the last axis puts side by side."""
    eqn = producer.get(index) if isinstance(index, ir.Var) else None
    if eqn is None or eqn.primitive.name != "concatenate" or eqn.params["dimension"] != index.aval.ndim - 1:
        return None
    columns = [a for a in eqn.invars if isinstance(a, ir.Var) and a.aval.shape[-1] == 1]
    return columns if len(columns) == len(eqn.invars) else None


def _same_size(table: ir.Atom, axis: int, index: ir.Atom, counted: int | None) -> bool:
    return counted is not None and ir.same_dim(table.aval.shape[axis], index.aval.shape[counted])


def _counted(atom: ir.Atom, producer: Mapping[ir.Var, ir.JaxprEqn]) -> int | None:
    """Returns the axis along which a value counts 0, 1, 2, ...; None where it is anything else."""
    eqn = producer.get(atom) if isinstance(atom, ir.Var) else None
    if eqn is None:
        return None
    name, operands = eqn.primitive.name, eqn.invars
    if name == "iota":
        return eqn.params["dimension"]
    if name in _MOVES:
        return _counted(operands[0], producer)
    if name == "broadcast_in_dim" and (axis := _counted(operands[0], producer)) is not None:
        after = eqn.params["broadcast_dimensions"][axis]
        return after if ir.same_dim(atom.aval.shape[after], operands[0].aval.shape[axis]) else None
    if name in ("add", "mul"):
        return _unchanged(eqn, producer)
    return _counted(operands[1], producer) if name == "select_n" and _from_the_end(eqn, producer) else None


def _unchanged(eqn: ir.JaxprEqn, producer: Mapping[ir.Var, ir.JaxprEqn]) -> int | None:
    """Sees through `arange` of a symbolic size, which is 0 + 1 * iota."""
    neutral = 0 if eqn.primitive.name == "add" else 1
    others = [a for a in eqn.invars if not (isinstance(a, ir.Literal) and np.all(a.val == neutral))]
    return _counted(others[0], producer) if len(others) == 1 else None


def _from_the_end(eqn: ir.JaxprEqn, producer: Mapping[ir.Var, ir.JaxprEqn]) -> bool:
    """Says whether a select only replaces numbers below zero, as JAX does with indices counted from the end."""
    below = producer.get(eqn.invars[0]) if isinstance(eqn.invars[0], ir.Var) else None
    if below is None or below.primitive.name != "lt" or below.invars[0] is not eqn.invars[1]:
        return False
    return isinstance(below.invars[1], ir.Literal) and bool(np.all(below.invars[1].val == 0))
