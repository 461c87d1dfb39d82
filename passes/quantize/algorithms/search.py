"""Scales of least weighted error: round to nearest with a search, as llama.cpp's importance matrix has it.

The error of a row is sum_j importance_j (w_j - r_j)^2, where importance is the mean of x_j^2 over calibration tokens:
the diagonal of GPTQ's Hessian. Without calibration all columns count alike.
"""

import functools

import jax
import jax.numpy as jnp

from xlathe.passes.quantize.algorithms.blocks import better, block_sum, refit, rounded
from xlathe.storage import Scaled, Steps

SHRINK = (1.1, 0.4)
"""The widest and the narrowest range tried, in units of the range of the values."""
TRIED = 36


@functools.partial(jax.jit, static_argnames="stored")
def search_steps(weight: jax.Array, importance: jax.Array, stored: Scaled) -> Steps:
    """Returns the steps of each block with the least weighted error among several ranges.

    weight: floating [n, k]; importance: [k], >= 0. Each range tried is followed by the scale that fits its levels best
    (weighted least squares). Never worse than `stored.fit`, which is the first that is tried. A block whose columns all
    have importance 0 is judged by its plain error.
    """
    low, high = stored.bounds(weight)
    heed = jnp.broadcast_to(importance.astype(weight.dtype), weight.shape)
    total, _ = stored.spread(Steps(block_sum(heed, stored)), weight.shape)
    heed = jnp.where(total > 0, heed, 1)
    start = stored.fit(weight)

    def error(steps: Steps) -> jax.Array:
        return block_sum(heed * jnp.square(weight - rounded(weight, steps, stored)), stored)

    def consider(best: tuple[Steps, jax.Array], steps: Steps) -> tuple[Steps, jax.Array]:
        found = error(steps)
        return better(found < best[1], steps, best[0]), jnp.minimum(found, best[1])

    def attempt(best: tuple[Steps, jax.Array], shrink: jax.Array) -> tuple[tuple[Steps, jax.Array], None]:
        steps = stored.steps(low * shrink, high * shrink, outer=start.outer)
        levels = stored.nearest(weight, *stored.spread(steps, weight.shape))
        return consider(consider(best, steps), refit(weight, levels, heed, steps, stored)), None

    shrinks = jnp.linspace(*SHRINK, TRIED, dtype=weight.dtype)
    return jax.lax.scan(attempt, (start, error(start)), shrinks)[0][0]
