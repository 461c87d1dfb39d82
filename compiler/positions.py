"""Evaluate values that depend on positions but not on tokens, at any positions.

A forward graph says `arange(t)`, `table[:t]`, `i >= j`. The incremental step needs the same values at the positions
of its tokens (role T), or at every position of a row's context (role L). A *role* is given to each axis of length t
of the value that is wanted, and pushed backwards through the graph.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlathe import jaxpr as ir
from xlathe.audit import carry
from xlathe.axes import Einsum
from xlathe.errors import DeriveError
from xlathe.layout_rules import ELEMENTWISE
from xlathe.layouts import Layout, Mixes, follows_positions
from xlathe.values import uniform_value


@dataclasses.dataclass(frozen=True, eq=False)
class Role:
    """What an axis of length t stands for: `positions` int32 [size]."""

    positions: jax.Array

    @property
    def size(self) -> ir.Dim:
        return self.positions.shape[0]


Roles = tuple[Role | None, ...]


class Static:
    """Evaluates token-independent values of one graph under roles.

    layouts: what the axes of the graph's values hold. values: its weights and constants, by variable. max_len: the
    longest length, for tables made by running sums. length: what `t` used as a number is; None refuses it
    (`only_shifts` says where it may be given).
    """

    def __init__(
        self,
        jaxpr: ir.Jaxpr,
        layouts: Mapping[ir.Var, Layout],
        values: Mapping[ir.Var, Any],
        max_len: int,
        length: int | None = None,
    ) -> None:
        self.producer = ir.producers(jaxpr.eqns)
        self.layouts = layouts
        self.values = values
        self.max_len = max_len
        self.length = length
        self.memo: dict[tuple[ir.Var, tuple[int, ...]], Any] = {}
        self.held: list[Roles] = []  # keeps memoized roles alive, so that their ids stay theirs

    def __call__(self, atom: ir.Atom, roles: Roles) -> Any:
        """Returns the value of `atom` with every axis of length t at its role's positions (and b = 1)."""
        if isinstance(atom, ir.Literal):
            return atom.val
        if atom in self.values:
            return self.values[atom]
        key = (atom, tuple(map(id, roles)))
        if key not in self.memo:
            self.held.append(roles)
            self.memo[key] = self._compute(atom, roles)
        return self.memo[key]

    def _compute(self, var: ir.Var, roles: Roles) -> Any:
        eqn = self.producer[var]
        name = eqn.primitive.name
        with ir.at_source_of(eqn):
            self._check_axes(eqn, var, roles)
            if name in ELEMENTWISE:
                operands = [self(a, _moving(a, roles)) for a in eqn.invars]
                return ir.bind(eqn, operands)[0]
            rule = _RULES.get(name, Static._reduce if name.startswith("reduce_") else None)
            return rule(self, eqn, var, roles) if rule else self.refuse(eqn, "of positions has no rule")

    def _check_axes(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> None:
        """Refuses a value whose axes do not have the same number of places for each position, or no role."""
        for factors, size, role in zip(self.layouts[var].axes, var.aval.shape, roles, strict=True):
            if ("t" in ir.dim_vars(size)) != (role is not None) or (role and not follows_positions(factors, size)):
                self.refuse(eqn, f"has an axis of size {size} that does not follow the positions")

    def refuse(self, eqn: ir.JaxprEqn, why: str) -> Any:
        raise DeriveError(f"no incremental step: {eqn.primitive.name} {why} at {ir.source_line(eqn)}")

    def shape(self, aval: Any, roles: Roles) -> tuple[ir.Dim, ...]:
        """Returns the shape of a value under roles."""
        return tuple(
            n if not ir.is_symbolic(n) else ir.substitute(n, {"b": 1, "t": role.size if role else 1})
            for n, role in zip(aval.shape, roles, strict=True)
        )

    def _iota(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        axis, shape, dtype = eqn.params["dimension"], self.shape(var.aval, roles), eqn.params["dtype"]
        role = roles[axis]
        if role is None:
            if ir.is_symbolic(var.aval.shape[axis]):
                self.refuse(eqn, "counts the rows, which a row cannot know,")
            return lax.broadcasted_iota(dtype, shape, axis)
        return lax.broadcast_in_dim(role.positions.astype(dtype), shape, (axis,))

    def _broadcast(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        axes = eqn.params["broadcast_dimensions"]
        kept = tuple(
            roles[d] if ir.is_symbolic(n) else None for n, d in zip(eqn.invars[0].aval.shape, axes, strict=True)
        )
        return lax.broadcast_in_dim(self(eqn.invars[0], kept), self.shape(var.aval, roles), axes)

    def _reshape(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        try:
            carry(eqn, [self.layouts[a] for a in eqn.invars[:1] if isinstance(a, ir.Var)])
        except Mixes as mixes:
            self.refuse(eqn, str(mixes))
        given = [role for role in roles if role is not None]
        before = eqn.invars[0].aval.shape
        wanted = [i for i, n in enumerate(before) if "t" in ir.dim_vars(n)]
        if len(wanted) != len(given):
            self.refuse(eqn, "across the position axis")
        by_axis = dict(zip(wanted, given, strict=True))
        inner = self(eqn.invars[0], tuple(by_axis.get(i) for i in range(len(before))))
        return jnp.reshape(inner, self.shape(var.aval, roles))

    def _transpose(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        permutation = eqn.params["permutation"]
        return lax.transpose(self(eqn.invars[0], _placed(roles, permutation, len(permutation))), permutation)

    def _squeeze(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        axes, ndim = eqn.params["dimensions"], eqn.invars[0].aval.ndim
        kept = [i for i in range(ndim) if i not in axes]
        return lax.squeeze(self(eqn.invars[0], _placed(roles, kept, ndim)), axes)

    def _expand_dims(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        axes = eqn.params["dimensions"]
        return lax.expand_dims(self(eqn.invars[0], tuple(r for i, r in enumerate(roles) if i not in axes)), axes)

    def _slice(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        strides = eqn.params["strides"] or (1,) * var.aval.ndim
        return self._window(eqn, var, roles, eqn.params["start_indices"], strides)

    def _dynamic_slice(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        known = [uniform_value(a, self.producer) for a in eqn.invars[1:]]
        if any(start is None for start in known):
            self.refuse(eqn, "at a start that is not known")
        starts = [
            0 if ir.is_symbolic(size) else self._moved_start(eqn, int(start), size, length)  # type: ignore[arg-type]
            for start, size, length in zip(known, eqn.invars[0].aval.shape, var.aval.shape, strict=True)
        ]
        return self._window(eqn, var, roles, starts, (1,) * var.aval.ndim)

    def _moved_start(self, eqn: ir.JaxprEqn, start: int, size: int, length: ir.Dim) -> int:
        """Returns where a window of a table starts: one that would leave the table is moved into it."""
        last = size - (self.max_len if ir.is_symbolic(length) else int(length))
        if ir.is_symbolic(length) and start > max(last, 0):
            self.refuse(eqn, f"from {start} on leaves a table of {size} in rows of up to {self.max_len} tokens")
        return min(max(start, 0), max(last, 0))

    def _window(
        self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles, starts: Sequence[ir.Dim], strides: Sequence[int]
    ) -> Any:
        """A window of a table: where it is t long it becomes a look-up at the role's positions."""
        before = eqn.invars[0].aval.shape
        whole = tuple(role if ir.is_symbolic(n) else None for n, role in zip(before, roles, strict=True))
        value = self(eqn.invars[0], whole)
        for axis, (size, role, start, stride) in enumerate(zip(before, roles, starts, strides, strict=True)):
            length = var.aval.shape[axis]
            if ir.is_symbolic(start) or (ir.is_symbolic(size) and not ir.same_dim(size, length)):
                self.refuse(eqn, "takes a part of the positions that depends on the length")
            if ir.is_symbolic(size):
                continue
            if role is not None:
                value = jnp.take(value, role.positions * stride + start, axis=axis, mode="clip")
            elif ir.is_symbolic(length):
                self.refuse(eqn, "takes as many entries as there are rows, which a row cannot know,")
            else:
                limit = start + max((length - 1) * stride + 1, 0)  # type: ignore[operator]
                value = lax.slice_in_dim(value, start, limit, stride, axis)  # type: ignore[arg-type]
        return value

    def _gather(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        table, index = eqn.invars
        if index.aval.ndim == 1:
            return self._gather_window(eqn, roles)
        if any(ir.is_symbolic(m) and not ir.same_dim(m, n) for m, n in zip(sizes, table.aval.shape, strict=True)):
            self.refuse(eqn, "takes a part of a table that depends on the length")
        if any(map(ir.is_symbolic, (*table.aval.shape, *sizes))):
            return self._gather_rows(eqn, var, roles)
        batch = [role for i, role in enumerate(roles) if i not in numbers.offset_dims]
        return ir.bind(eqn, [self(table, (None,) * table.aval.ndim), self(index, (*batch, None))])[0]

    def _gather_window(self, eqn: ir.JaxprEqn, roles: Roles) -> Any:
        """One window of a table, as `table[3, :t]` makes it: a look-up at the role's positions where it is t long."""
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        table, index = eqn.invars
        shape = table.aval.shape
        kept = [i for i in range(table.aval.ndim) if i not in numbers.collapsed_slice_dims]
        by_axis = dict(zip(kept, roles, strict=True))
        symbolic = [i for i, n in enumerate(shape) if ir.is_symbolic(n)]
        if any(i in numbers.start_index_map or not ir.same_dim(sizes[i], shape[i]) for i in symbolic):
            self.refuse(eqn, "by an index into the positions")
        index_value = self(index, (None,))
        looked_up = {i: 0 for i in kept if ir.is_symbolic(sizes[i]) and i not in symbolic}
        for j, axis in enumerate(numbers.start_index_map):
            if axis in looked_up:
                (start,) = self._entries(eqn, index)[j : j + 1]
                looked_up[axis] = self._moved_start(eqn, start, shape[axis], sizes[axis])
                index_value = index_value.at[j].set(0)
        value = self(table, tuple(by_axis.get(i) if i in symbolic else None for i in range(table.aval.ndim)))
        whole = tuple(value.shape[i] if i in (*symbolic, *looked_up) else n for i, n in enumerate(sizes))
        value = ir.bind(eqn, [value, index_value], slice_sizes=whole)[0]
        for axis, start in looked_up.items():
            role = by_axis[axis]
            if role is None:
                self.refuse(eqn, "takes as many entries as there are rows, which a row cannot know,")
            value = jnp.take(value, role.positions + start, axis=kept.index(axis), mode="clip")
        return value

    def _entries(self, eqn: ir.JaxprEqn, atom: ir.Atom) -> list[int]:
        """Returns the entries of a vector of start indices."""
        made_by = self.producer.get(atom) if isinstance(atom, ir.Var) else None
        parts = made_by.invars if made_by is not None and made_by.primitive.name == "concatenate" else [atom]
        known = [(uniform_value(part, self.producer), part.aval.shape[0]) for part in parts]
        if any(value is None for value, _ in known):
            self.refuse(eqn, "at a start that is not known")
        return [int(value) for value, count in known for _ in range(count)]  # type: ignore[arg-type]

    def _gather_rows(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
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
        found = self(index, (*batch, None))  # first, as it may be refused for a reason of its own
        if any(
            i in dropped or i in numbers.start_index_map or not ir.same_dim(sizes[i], table.aval.shape[i])
            for i in moved
        ):
            self.refuse(eqn, "by an index into the positions")
        value = self(table, tuple(inner))
        new_sizes = tuple(value.shape[i] if i in moved else n for i, n in enumerate(sizes))
        return ir.bind(eqn, [value, found], slice_sizes=new_sizes)[0]

    def _concatenate(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        if ir.is_symbolic(var.aval.shape[eqn.params["dimension"]]):
            self.refuse(eqn, "along the positions or rows")
        return lax.concatenate([self(a, roles) for a in eqn.invars], eqn.params["dimension"])

    def _split(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        if ir.is_symbolic(eqn.invars[0].aval.shape[eqn.params["axis"]]):
            self.refuse(eqn, "along the positions or rows")
        return ir.bind(eqn, [self(eqn.invars[0], roles)])[eqn.outvars.index(var)]

    def _stack(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        axis = eqn.params["axis"]
        return jnp.stack([self(a, (*roles[:axis], *roles[axis + 1 :])) for a in eqn.invars], axis)

    def _unstack(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        axis = eqn.params["axis"]
        value = self(eqn.invars[0], (*roles[:axis], None, *roles[axis:]))
        return lax.index_in_dim(value, eqn.outvars.index(var), axis, keepdims=False)

    def _tile(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        reps, before = eqn.params["reps"], eqn.invars[0].aval.shape
        if any(ir.is_symbolic(m) and not ir.same_dim(m, n) for m, n in zip(var.aval.shape, before, strict=True)):
            self.refuse(eqn, "repeats as often as there are positions or rows")
        return jnp.tile(self(eqn.invars[0], _moving(eqn.invars[0], roles)), reps)

    def _pad(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        for size, padding in zip(var.aval.shape, eqn.params["padding_config"], strict=True):
            if ir.is_symbolic(size) and any(not ir.same_dim(n, 0) for n in padding):
                self.refuse(eqn, "shifts the positions")
        return ir.bind(eqn, [self(eqn.invars[0], roles), self(eqn.invars[1], ())])[0]

    def _dot_general(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        einsum = Einsum.of(eqn)
        operands = []
        for atom, axes in zip(eqn.invars, (einsum.lhs, einsum.rhs), strict=True):
            given = [None if out is None else roles[out] for out in axes]
            for out, size in zip(axes, atom.aval.shape, strict=True):
                if out is None and ir.is_symbolic(size):
                    self.refuse(eqn, "sums over the positions")
            operands.append(self(atom, tuple(given)))
        return ir.bind(eqn, operands)[0]

    def _reduce(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        before, axes = eqn.invars[0].aval, eqn.params["axes"]
        if any(ir.is_symbolic(before.shape[axis]) for axis in axes):
            self.refuse(eqn, "over the positions")
        kept = [i for i in range(before.ndim) if i not in axes]
        return ir.bind(eqn, [self(eqn.invars[0], _placed(roles, kept, before.ndim))])[0]

    def _running(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        """A running sum over positions is a table: made once over all positions, then looked up."""
        axis = eqn.params["axis"]
        role = roles[axis]
        if role is None:
            if ir.is_symbolic(var.aval.shape[axis]):
                self.refuse(eqn, "accumulates over the rows")
            return ir.bind(eqn, [self(eqn.invars[0], roles)])[0]
        if eqn.params["reverse"]:
            self.refuse(eqn, "from the end of the row")
        everywhere = Role(jnp.arange(self.max_len, dtype=jnp.int32))
        table = ir.bind(eqn, [self(eqn.invars[0], (*roles[:axis], everywhere, *roles[axis + 1 :]))])[0]
        return jnp.take(table, role.positions, axis=axis, mode="clip")

    def _dim_as_value(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        if "b" in ir.dim_vars(eqn.params["dim"]):
            self.refuse(eqn, "uses the number of rows as a number, which a row cannot know,")
        if "t" in ir.dim_vars(eqn.params["dim"]) and self.length is None:
            self.refuse(eqn, "uses the total length as a number, which earlier tokens cannot know,")
        return jnp.asarray(ir.substitute(eqn.params["dim"], {"b": 1, "t": self.length or 1}), var.aval.dtype)


    def _barrier(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        return self(eqn.invars[eqn.outvars.index(var)], roles)


_RULES = {
    "iota": Static._iota,
    "broadcast_in_dim": Static._broadcast,
    "reshape": Static._reshape,
    "transpose": Static._transpose,
    "squeeze": Static._squeeze,
    "expand_dims": Static._expand_dims,
    "slice": Static._slice,
    "dynamic_slice": Static._dynamic_slice,
    "gather": Static._gather,
    "concatenate": Static._concatenate,
    "stack": Static._stack,
    "unstack": Static._unstack,
    "tile": Static._tile,
    "split": Static._split,
    "pad": Static._pad,
    "dot_general": Static._dot_general,
    "cumsum": Static._running,
    "cumprod": Static._running,
    "cummax": Static._running,
    "cummin": Static._running,
    "dim_as_value": Static._dim_as_value,
    "optimization_barrier": Static._barrier,
}


def _moving(atom: ir.Atom, roles: Roles) -> Roles:
    """The roles of an elementwise operand: scalars have no axes, and axes of size 1 have no role."""
    shape = atom.aval.shape
    return tuple(role if ir.is_symbolic(n) else None for n, role in zip(shape, roles, strict=False))


def _placed(roles: Roles, axes: Sequence[int], ndim: int) -> Roles:
    """Puts the i-th role on operand axis `axes[i]`; the other axes have none."""
    placed: list[Role | None] = [None] * ndim
    for role, axis in zip(roles, axes, strict=True):
        placed[axis] = role
    return tuple(placed)
