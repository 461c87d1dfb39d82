"""AWQ: channels that carry large activations are scaled up before rounding, and ranges are clipped.

Lin et al. 2023, https://arxiv.org/abs/2306.00978.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.passes.quantize.algorithms.blocks import better, block_sum, output_error, rounded
from xlathe.storage import Scaled, Steps

RATIOS = 21  # exponents tried, 0 (nothing is scaled) to 1
SMALLEST = 1e-4
CLIPS = 10  # ranges tried, from all to half of it


def awq_scales(weights: Sequence[jax.Array], absolute: np.ndarray, gram: np.ndarray, stored: Scaled) -> np.ndarray:
    """Returns what the columns of weights that read the same activations are to be multiplied with, float64 [k].

    weights: floating [n, k] each. absolute: mean |x| of each channel, [k]. gram: X^T X, [k, k]. Of the scales
    absolute^r, r from 0 to 1, those with the least error of the products with round to nearest; what is multiplied
    into the weights is divided out of the activations. Never worse than no scales, which are among those tried.
    """
    absolute = np.maximum(np.asarray(absolute, np.float64), SMALLEST)
    tried = [normalized(absolute**ratio) for ratio in np.linspace(0, 1, RATIOS)]
    errors = [sum(float(_scaled_error(w, s, gram, stored)) for w in map(jnp.asarray, weights)) for s in tried]
    return tried[int(np.argmin(errors))]


def normalized(scales: np.ndarray) -> np.ndarray:
    """Returns scales divided by the geometric mean of their largest and smallest, and no smaller than 1e-4."""
    scales = np.maximum(scales, SMALLEST)
    return np.maximum(scales / np.sqrt(scales.max() * scales.min()), SMALLEST)


@functools.partial(jax.jit, static_argnames="stored")
def _scaled_error(weight: jax.Array, scales: jax.Array, gram: jax.Array, stored: Scaled) -> jax.Array:
    scales = scales.astype(weight.dtype)
    scaled = weight * scales
    return output_error(weight, rounded(scaled, stored.fit(scaled), stored) / scales, gram.astype(weight.dtype))


@functools.partial(jax.jit, static_argnames="stored")
def clip_ranges(weight: jax.Array, gram: jax.Array, stored: Scaled) -> Steps:
    """Returns steps of each block of [n, k] whose range, down to half, gives the least error of its products.

    gram: X^T X, [k, k]; what columns of different blocks have in common is left out.
    """
    columns = stored.columns or weight.shape[1]
    block = jnp.arange(weight.shape[1]) // columns
    own = jnp.where(block[:, None] == block, gram.astype(weight.dtype), 0)
    low, high = stored.bounds(weight)
    start = stored.fit(weight)

    def error(steps: Steps) -> jax.Array:
        difference = weight - rounded(weight, steps, stored)
        return block_sum((difference @ own) * difference, stored)

    def attempt(best: tuple[Steps, jax.Array], shrink: jax.Array) -> tuple[tuple[Steps, jax.Array], None]:
        steps = stored.steps(low * shrink, high * shrink, outer=start.outer)
        found = error(steps)
        return (better(found < best[1], steps, best[0]), jnp.minimum(found, best[1])), None

    shrinks = 1 - jnp.arange(1, CLIPS, dtype=weight.dtype) / (2 * CLIPS)
    return jax.lax.scan(attempt, (start, error(start)), shrinks)[0][0]
