"""Evaluate values that depend on positions but not on tokens, at any positions.

A forward graph says `arange(t)`, `table[:t]`, `i >= j`. The incremental step needs the same values at the positions
of its tokens (role T), or at every position of a row's context (role L). A *role* is given to each axis of length t
of the value that is wanted, and pushed backwards through the graph.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from xlathe import jaxpr as ir
from xlathe import position_tables
from xlathe.axes import Einsum
from xlathe.errors import DeriveError
from xlathe.layout_rules import ELEMENTWISE, carry
from xlathe.layouts import Layout, Mixes, follows_positions


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

    def refuse(self, eqn: ir.JaxprEqn, why: str) -> NoReturn:
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

    def _empty(self, eqn: ir.JaxprEqn, var: ir.Var, roles: Roles) -> Any:
        """Room that is written to later; what it holds before is nobody's to read."""
        return jnp.zeros(self.shape(var.aval, roles), var.aval.dtype)

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
        before, after = eqn.invars[0].aval.shape, self.shape(var.aval, roles)
        value = self(eqn.invars[0], _moving(eqn.invars[0], roles))
        reps = []
        for old, new, size, rep in zip(before, var.aval.shape, after, eqn.params["reps"], strict=True):
            if old != 1 and ir.is_symbolic(new) and not ir.same_dim(new, old):
                self.refuse(eqn, "repeats as often as there are positions or rows")
            reps.append(size if old == 1 else rep)
        return jnp.tile(value, reps)

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
    "empty": Static._empty,
    "reshape": Static._reshape,
    "transpose": Static._transpose,
    "squeeze": Static._squeeze,
    "expand_dims": Static._expand_dims,
    "slice": position_tables.slice_,
    "dynamic_slice": position_tables.dynamic_slice,
    "gather": position_tables.gather,
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
