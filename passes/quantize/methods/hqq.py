"""Half-quadratic quantization: group parameters that heed outliers less, without any calibration.

Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/. It minimizes sum |w - r|^p, p < 1, by splitting off an
error e: e is a shrinkage of w - r (the generalized soft threshold), and then one number a group fits w - e.
"""

import functools

import jax
import jax.numpy as jnp

from xlathe.passes.quantize.methods.grid import Grid, Params
from xlathe.passes.quantize.methods.search import refit

NORM = 0.7
BETA = 10.0
STEPS = 20


@functools.partial(jax.jit, static_argnames="grid")
def hqq(weight: jax.Array, grid: Grid) -> Params:
    """Returns scale and zero point of each group of a weight, floating [n, k].

    The method moves a zero point that is a fraction. Where zero points are stored as whole numbers, as here, the
    number that moves is the scale, by the same splitting. The best iterate by the p-norm stays.
    """
    values, start = grid.groups(weight), grid.fit(weight)

    def loss(params: Params) -> jax.Array:
        return (jnp.abs(values - grid.groups(grid.nearest(weight, params))) ** NORM).sum(axis=-1)

    def step(state: tuple[Params, Params, jax.Array], _: None) -> tuple[tuple[Params, Params, jax.Array], None]:
        params, best, least = state
        codes = grid.groups(grid.codes(weight, params))
        split = shrink(values - grid.groups(grid.nearest(weight, params)))
        params = refit(values - split, codes, jnp.ones_like(values), params, grid)
        found = loss(params)
        wins = found < least
        best = Params(*(jnp.where(wins, new, old) for new, old in zip(params, best, strict=True)))
        return (params, best, jnp.minimum(found, least)), None

    return jax.lax.scan(step, (start, start, loss(start)), length=STEPS)[0][1]


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def hqq_fractional(weight: jax.Array, bits: int, group: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The method as published: codes [n, k], scale and fractional zero point [n, k / group]; w ~ (code - zero) * scale.

    A group whose values differ by no more than 1e-4 has the scale 1, and no scale is below 1 / 20,000.
    """
    values, last = weight.reshape(weight.shape[0], -1, group), 2**bits - 1
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    inverse = jnp.where(high - low > 1e-4, jnp.minimum(last / jnp.maximum(high - low, 1e-30), 2e4), 1.0)

    def step(zero: jax.Array, _: None) -> tuple[jax.Array, None]:
        codes = jnp.clip(jnp.round(values * inverse + zero), 0, last)
        split = shrink(values - (codes - zero) / inverse)
        return jnp.mean(codes - (values - split) * inverse, axis=-1, keepdims=True), None

    zero, _ = jax.lax.scan(step, -low * inverse, length=STEPS)
    codes = jnp.clip(jnp.round(values * inverse + zero), 0, last)
    return codes.reshape(weight.shape), (1 / inverse)[..., 0], zero[..., 0]


def shrink(x: jax.Array) -> jax.Array:
    """The generalized soft threshold sign(x) relu(|x| - |x|^(p - 1) / beta)."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(size - jnp.where(size > 0, size, 1) ** (NORM - 1) / BETA, 0)
