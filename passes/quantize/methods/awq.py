"""AWQ: channels that carry large activations are scaled up before rounding, and ranges are clipped.

Lin et al. 2023, https://arxiv.org/abs/2306.00978.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.passes.quantize.methods.grid import Grid, Params, output_error

RATIOS = 21  # exponents tried, 0 (nothing is scaled) to 1
SMALLEST = 1e-4
CLIPS = 10  # ranges tried, from all to half of it


def awq_scales(weights: Sequence[jax.Array], absolute: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """Returns what the columns of weights that read the same activations are to be multiplied with, float64 [k].

    weights: floating [n, k] each. absolute: mean |x| of each channel, [k]. gram: X^T X, [k, k]. Of the scales
    absolute^r, r from 0 to 1, those with the least error of the products with round to nearest; what is multiplied
    into the weights is divided out of the activations. Never worse than no scales, which are among those tried.
    """
    absolute = np.maximum(np.asarray(absolute, np.float64), SMALLEST)
    tried = [normalized(absolute**ratio) for ratio in np.linspace(0, 1, RATIOS)]
    errors = [sum(float(_scaled_error(w, s, gram, grid)) for w in map(jnp.asarray, weights)) for s in tried]
    return tried[int(np.argmin(errors))]


def normalized(scales: np.ndarray) -> np.ndarray:
    """Returns scales divided by the geometric mean of their largest and smallest, and no smaller than 1e-4."""
    scales = np.maximum(scales, SMALLEST)
    return np.maximum(scales / np.sqrt(scales.max() * scales.min()), SMALLEST)


@functools.partial(jax.jit, static_argnames="grid")
def _scaled_error(weight: jax.Array, scales: jax.Array, gram: jax.Array, grid: Grid) -> jax.Array:
    scales = scales.astype(weight.dtype)
    scaled = weight * scales
    return output_error(weight, grid.nearest(scaled, grid.fit(scaled)) / scales, gram.astype(weight.dtype))


@functools.partial(jax.jit, static_argnames="grid")
def clip_ranges(weight: jax.Array, gram: jax.Array, grid: Grid) -> Params:
    """Returns parameters of each group of [n, k] whose range, down to half, gives the least error of its products.

    gram: X^T X, [k, k]; only the blocks on its diagonal, one a group, are read.
    """
    count = weight.shape[1] // grid.group
    own = gram.astype(weight.dtype).reshape(count, grid.group, count, grid.group)
    own = own[jnp.arange(count), :, jnp.arange(count)]  # [groups, group, group]
    low, high = grid.extent(weight)

    def attempt(best: tuple[Params, jax.Array], shrink: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
        params = grid.span(low * shrink, high * shrink)
        difference = grid.groups(weight - grid.nearest(weight, params))
        error = jnp.einsum("ngi,gij,ngj->ng", difference, own, difference)
        wins = error < best[1]
        kept = Params(*(jnp.where(wins, new, old) for new, old in zip(params, best[0], strict=True)))
        return (kept, jnp.minimum(error, best[1])), None

    start = (grid.fit(weight), jnp.full_like(low, jnp.inf))
    shrinks = 1 - jnp.arange(CLIPS, dtype=weight.dtype) / (2 * CLIPS)
    return jax.lax.scan(attempt, start, shrinks)[0][0]
