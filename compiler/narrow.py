"""Compute before spreading: an elementwise operation on values that were only broadcast is done on the small ones.

A mask made of `broadcast(i) >= broadcast(j)` keeps two axes and is spread over rows and heads at the end, so that
whoever reads it sees which axes it has.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from xlathe import jaxpr as ir
from xlathe.layout_rules import ELEMENTWISE


@dataclasses.dataclass(frozen=True)
class _Spread:
    """A value and the small one that it was spread from: axis i of `small` became axis `axes[i]`."""

    value: Any  # holds the value, so that its id stays its own
    small: Any
    axes: tuple[int, ...]


def narrow(jaxpr: ir.Jaxpr) -> ir.Jaxpr:
    """Returns the program with every broadcast moved below the elementwise operations on it."""
    spread: dict[int, _Spread] = {}

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        if eqn.primitive.name == "broadcast_in_dim":
            return [_remember(spread, ir.bind(eqn, operands)[0], *_composed(spread, eqn, operands[0]))]
        wide = [x for x in operands if jnp.ndim(x)]
        if eqn.primitive.name not in ELEMENTWISE or len(eqn.outvars) > 1 or not wide:
            return None
        shape = eqn.outvars[0].aval.shape
        if any(id(x) not in spread or jnp.ndim(x) != len(shape) for x in wide):
            return None
        axes = sorted({axis for x in wide for axis in spread[id(x)].axes})
        if len(axes) == len(shape):
            return None
        small = ir.bind(eqn, [_onto(spread[id(x)], axes, shape) if jnp.ndim(x) else x for x in operands])[0]
        return [_remember(spread, lax.broadcast_in_dim(small, shape, axes), small, tuple(axes))]

    return ir.retrace(jaxpr, rule)


def _remember(spread: dict[int, _Spread], value: Any, small: Any, axes: tuple[int, ...]) -> Any:
    spread[id(value)] = _Spread(value, small, axes)
    return value


def _composed(spread: dict[int, _Spread], eqn: ir.JaxprEqn, operand: Any) -> tuple[Any, tuple[int, ...]]:
    """Returns what a broadcast spreads, without axes of size 1, and where the axes go."""
    axes = tuple(eqn.params["broadcast_dimensions"])
    if id(operand) in spread:
        before = spread[id(operand)]
        operand, axes = before.small, tuple(axes[i] for i in before.axes)
    ones = [i for i, n in enumerate(jnp.shape(operand)) if ir.same_dim(n, 1)]
    small = lax.squeeze(operand, ones) if ones else operand
    return small, tuple(axis for i, axis in enumerate(axes) if i not in ones)


def _onto(spread: _Spread, axes: list[int], shape: tuple[ir.Dim, ...]) -> Any:
    """Spreads a small value over `axes` of the full shape only."""
    if list(spread.axes) == axes:
        return spread.small
    return lax.broadcast_in_dim(spread.small, [shape[a] for a in axes], [axes.index(a) for a in spread.axes])
