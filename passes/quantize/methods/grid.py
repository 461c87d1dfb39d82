"""The integer grids that weights are rounded to: what every method chooses scales, zero points and codes of."""

import dataclasses
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp


class Params(NamedTuple):
    """Scale and zero point of each group, floating [n, k / group]; the zero point is a whole number."""

    scale: jax.Array
    zero: jax.Array


@final
@dataclasses.dataclass(frozen=True)
class Grid:
    """The values (code - zero) * scale, code from 0 to 2^bits - 1, where `group` columns of a row share both numbers.

    Symmetric, the zero point is 2^(bits - 1) and the value of largest magnitude lies that many steps below zero (its
    scale may be negative), as in ggml's Q4_0. Otherwise the codes span the values and zero. A group of zeros has the
    scale 0, and stays exactly 0. stored: the dtype that scales are kept in; they are rounded to it before any code is
    chosen.
    """

    bits: int
    group: int
    symmetric: bool
    stored: str = "bfloat16"

    @property
    def last(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def groups(self, weight: jax.Array) -> jax.Array:
        """Returns [n, k] as [n, k / group, group]."""
        return weight.reshape(weight.shape[0], -1, self.group)

    def extent(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the least and the largest value of each group of [n, k], and zero, as [n, k / group]."""
        values = self.groups(weight)
        return jnp.minimum(values.min(axis=-1), 0), jnp.maximum(values.max(axis=-1), 0)

    def span(self, low: jax.Array, high: jax.Array) -> Params:
        """Returns the parameters whose codes reach from `low` <= 0 to `high` >= 0; it is differentiable in both."""
        if self.symmetric:
            scale = self.keep(jnp.where(-low >= high, low, high) / -self.middle)
            return Params(scale, jnp.full_like(scale, self.middle))
        scale = self.keep((high - low) / self.last)
        return Params(scale, jnp.clip(round_through(-low / _divisor(scale)), 0, self.last))

    def fit(self, weight: jax.Array) -> Params:
        """Returns the parameters of round to nearest."""
        return self.span(*self.extent(weight))

    def keep(self, scale: jax.Array) -> jax.Array:
        """Rounds scales to what is stored; gradients pass."""
        stored = scale.astype(jnp.dtype(self.stored)).astype(scale.dtype)
        return scale + jax.lax.stop_gradient(stored - scale)

    def codes(self, weight: jax.Array, params: Params) -> jax.Array:
        """Returns the nearest codes of [n, k], floating."""
        return self._codes(self.groups(weight), params, 0.0).reshape(weight.shape)

    def nearest(self, weight: jax.Array, params: Params, shift: jax.Array | float = 0.0) -> jax.Array:
        """Returns [n, k] rounded to the grid; gradients pass through rounding.

        shift: what is added before rounding, in steps, [n, k].
        """
        shift = self.groups(jnp.broadcast_to(shift, weight.shape))
        return self.values(self._codes(self.groups(weight), params, shift).reshape(weight.shape), params)

    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        """Returns what codes [n, k] stand for."""
        return ((self.groups(codes) - params.zero[..., None]) * params.scale[..., None]).reshape(codes.shape)

    def _codes(self, values: jax.Array, params: Params, shift: jax.Array | float) -> jax.Array:
        steps = values / _divisor(params.scale)[..., None] + shift
        return jnp.clip(round_through(steps) + params.zero[..., None], 0, self.last)


def round_through(x: jax.Array) -> jax.Array:
    """Rounds, half to even; the gradient is that of the identity (a straight-through estimator)."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def round_column(column: jax.Array, scale: jax.Array, zero: jax.Array, last: int) -> jax.Array:
    """Returns a column [n] rounded to a grid; scale, zero: [n], of the group that it is in."""
    return (jnp.clip(jnp.round(column / _divisor(scale)) + zero, 0, last) - zero) * scale


def output_error(weight: jax.Array, rounded: jax.Array, gram: jax.Array) -> jax.Array:
    """Returns the squared error of the products with all tokens seen, tr((w - r) X^T X (w - r)^T)."""
    difference = weight - rounded
    return jnp.sum((difference @ gram) * difference)


def _divisor(scale: jax.Array) -> Any:
    return jnp.where(scale == 0, 1, scale)
