"""Windows of tables and look-ups in them, as a step makes them: at its tokens' positions.

A window as long as the row, `table[:t]`, becomes a look-up at the positions of a role. These are rules of `Static`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from xlathe import jaxpr as ir
from xlathe.values import uniform_value

if TYPE_CHECKING:
    from xlathe.positions import Role, Roles, Static


def slice_(static: "Static", eqn: ir.JaxprEqn, var: ir.Var, roles: "Roles") -> Any:
    strides = eqn.params["strides"] or (1,) * var.aval.ndim
    return _window(static, eqn, var, roles, eqn.params["start_indices"], strides)


def dynamic_slice(static: "Static", eqn: ir.JaxprEqn, var: ir.Var, roles: "Roles") -> Any:
    known = [uniform_value(a, static.producer) for a in eqn.invars[1:]]
    if any(start is None for start in known):
        static.refuse(eqn, "at a start that is not known")
    starts = [
        0 if ir.is_symbolic(size) else _moved_start(static, eqn, int(start), size, length)  # type: ignore[arg-type]
        for start, size, length in zip(known, eqn.invars[0].aval.shape, var.aval.shape, strict=True)
    ]
    return _window(static, eqn, var, roles, starts, (1,) * var.aval.ndim)


def _moved_start(static: "Static", eqn: ir.JaxprEqn, start: int, size: int, length: ir.Dim) -> int:
    """Returns where a window of a table starts: one that would leave the table is moved into it."""
    last = size - (static.max_len if ir.is_symbolic(length) else int(length))
    if ir.is_symbolic(length) and start > max(last, 0):
        static.refuse(eqn, f"from {start} on leaves a table of {size} in rows of up to {static.max_len} tokens")
    return min(max(start, 0), max(last, 0))


def _window(
    static: "Static", eqn: ir.JaxprEqn, var: ir.Var, roles: "Roles", starts: Sequence[ir.Dim], strides: Sequence[int]
) -> Any:
    """A window of a table: where it is t long it becomes a look-up at the role's positions."""
    before = eqn.invars[0].aval.shape
    whole = tuple(role if ir.is_symbolic(n) else None for n, role in zip(before, roles, strict=True))
    value = static(eqn.invars[0], whole)
    for axis, (size, role, start, stride) in enumerate(zip(before, roles, starts, strides, strict=True)):
        length = var.aval.shape[axis]
        if ir.is_symbolic(start) or (ir.is_symbolic(size) and not ir.same_dim(size, length)):
            static.refuse(eqn, "takes a part of the positions that depends on the length")
        if ir.is_symbolic(size):
            continue
        if role is not None:
            value = jnp.take(value, role.positions * stride + start, axis=axis, mode="clip")
        elif ir.is_symbolic(length):
            static.refuse(eqn, "takes as many entries as there are rows, which a row cannot know,")
        else:
            limit = start + max((length - 1) * stride + 1, 0)
            value = lax.slice_in_dim(value, start, limit, stride, axis)  # type: ignore[arg-type]
    return value


def gather(static: "Static", eqn: ir.JaxprEqn, var: ir.Var, roles: "Roles") -> Any:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, index = eqn.invars
    if index.aval.ndim == 1:
        return _gather_window(static, eqn, roles)
    if any(ir.is_symbolic(m) and not ir.same_dim(m, n) for m, n in zip(sizes, table.aval.shape, strict=True)):
        static.refuse(eqn, "takes a part of a table that depends on the length")
    if any(map(ir.is_symbolic, (*table.aval.shape, *sizes))):
        return _gather_rows(static, eqn, var, roles)
    batch = [role for i, role in enumerate(roles) if i not in numbers.offset_dims]
    return ir.bind(eqn, [static(table, (None,) * table.aval.ndim), static(index, (*batch, None))])[0]


def _gather_window(static: "Static", eqn: ir.JaxprEqn, roles: "Roles") -> Any:
    """One window of a table, as `table[3, :t]` makes it: a look-up at the role's positions where it is t long."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, index = eqn.invars
    shape = table.aval.shape
    kept = [i for i in range(table.aval.ndim) if i not in numbers.collapsed_slice_dims]
    by_axis = dict(zip(kept, roles, strict=True))
    symbolic = [i for i, n in enumerate(shape) if ir.is_symbolic(n)]
    if any(i in numbers.start_index_map or not ir.same_dim(sizes[i], shape[i]) for i in symbolic):
        static.refuse(eqn, "by an index into the positions")
    index_value = static(index, (None,))
    looked_up = {i: 0 for i in kept if ir.is_symbolic(sizes[i]) and i not in symbolic}
    for j, axis in enumerate(numbers.start_index_map):
        if axis in looked_up:
            (start,) = _entries(static, eqn, index)[j : j + 1]
            looked_up[axis] = _moved_start(static, eqn, start, shape[axis], sizes[axis])
            index_value = index_value.at[j].set(0)
    value = static(table, tuple(by_axis.get(i) if i in symbolic else None for i in range(table.aval.ndim)))
    whole = tuple(value.shape[i] if i in (*symbolic, *looked_up) else n for i, n in enumerate(sizes))
    value = ir.bind(eqn, [value, index_value], slice_sizes=whole)[0]
    for axis, start in looked_up.items():
        role = by_axis[axis]
        if role is None:
            static.refuse(eqn, "takes as many entries as there are rows, which a row cannot know,")
        value = jnp.take(value, role.positions + start, axis=kept.index(axis), mode="clip")
    return value


def _entries(static: "Static", eqn: ir.JaxprEqn, atom: ir.Atom) -> list[int]:
    """Returns the entries of a vector of start indices."""
    made_by = static.producer.get(atom) if isinstance(atom, ir.Var) else None
    parts = made_by.invars if made_by is not None and made_by.primitive.name == "concatenate" else [atom]
    known = [(uniform_value(part, static.producer), part.aval.shape[0]) for part in parts]
    if any(value is None for value, _ in known):
        static.refuse(eqn, "at a start that is not known")
    return [int(value) for value, count in known for _ in range(count)]  # type: ignore[arg-type]


def _gather_rows(static: "Static", eqn: ir.JaxprEqn, var: ir.Var, roles: "Roles") -> Any:
    """A gather of whole position axes by a known index into other axes."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, index = eqn.invars
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(table.aval.ndim) if i not in dropped]
    inner: list[Role | None] = [None] * table.aval.ndim
    for axis, source in zip(numbers.offset_dims, kept, strict=True):
        inner[source] = roles[axis]
    moved = [i for i, n in enumerate(table.aval.shape) if ir.is_symbolic(n)]
    batch = [role for i, role in enumerate(roles) if i not in numbers.offset_dims]
    found = static(index, (*batch, None))  # first, as it may be refused for a reason of its own
    if any(
        i in dropped or i in numbers.start_index_map or not ir.same_dim(sizes[i], table.aval.shape[i]) for i in moved
    ):
        static.refuse(eqn, "by an index into the positions")
    value = static(table, tuple(inner))
    new_sizes = tuple(value.shape[i] if i in moved else n for i, n in enumerate(sizes))
    return ir.bind(eqn, [value, found], slice_sizes=new_sizes)[0]
