"""Scales of least weighted error: round to nearest with a search, as llama.cpp's importance matrix has it.

The error of a row is sum_j importance_j (w_j - r_j)^2, where importance is the mean of x_j^2 over calibration tokens:
the diagonal of GPTQ's Hessian. Without calibration all columns count alike.
"""

import functools

import jax
import jax.numpy as jnp

from xlathe.passes.quantize.methods.grid import Grid, Params

SHRINK = (1.1, 0.4)
"""The widest and the narrowest range tried, in units of the range of the values."""
TRIED = 36


@functools.partial(jax.jit, static_argnames="grid")
def search_scales(weight: jax.Array, importance: jax.Array, grid: Grid) -> Params:
    """Returns the parameters of each group with the least weighted error among several ranges.

    weight: floating [n, k]; importance: [k], >= 0. Each range tried is followed by the scale that fits its codes best
    (weighted least squares). Never worse than `grid.fit`, which is the first that is tried. A group whose columns all
    have importance 0 is judged by its plain error.
    """
    low, high = grid.extent(weight)
    heed = grid.groups(jnp.broadcast_to(importance.astype(weight.dtype), weight.shape))
    heed = jnp.where(heed.max(axis=-1, keepdims=True) > 0, heed, 1)
    values = grid.groups(weight)

    def error(params: Params) -> jax.Array:
        return (heed * jnp.square(values - grid.groups(grid.nearest(weight, params)))).sum(axis=-1)

    def better(best: tuple[Params, jax.Array], params: Params) -> tuple[Params, jax.Array]:
        found = error(params)
        wins = found < best[1]
        return Params(*(jnp.where(wins, new, old) for new, old in zip(params, best[0], strict=True))), jnp.minimum(
            found, best[1]
        )

    def attempt(best: tuple[Params, jax.Array], shrink: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
        params = grid.span(low * shrink, high * shrink)
        best = better(best, params)
        return better(best, refit(values, grid.groups(grid.codes(weight, params)), heed, params, grid)), None

    start = grid.fit(weight)
    shrinks = jnp.linspace(*SHRINK, TRIED, dtype=weight.dtype)
    return jax.lax.scan(attempt, (start, error(start)), shrinks)[0][0]


def refit(values: jax.Array, codes: jax.Array, heed: jax.Array, params: Params, grid: Grid) -> Params:
    """Returns the scale with which codes [n, groups, group] come closest to values; it stays where they are all 0."""
    steps = codes - params.zero[..., None]
    square = (heed * jnp.square(steps)).sum(axis=-1)
    scale = (heed * values * steps).sum(axis=-1) / jnp.where(square > 0, square, 1)
    return Params(jnp.where(square > 0, grid.keep(scale), params.scale), params.zero)
