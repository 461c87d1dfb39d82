"""What methods share: sums over the blocks that share a scale, and errors of rounding."""

from typing import Any

import jax
import jax.numpy as jnp

from xlathe.storage import Scaled, Steps


def block_sum(values: jax.Array, stored: Scaled) -> jax.Array:
    """Returns the sum of [n, k] over each block: [blocks of rows, blocks of columns]."""
    n, k = values.shape
    rows, columns = stored.rows or n, stored.columns or k
    padded = jnp.pad(values, ((0, -n % rows), (0, -k % columns)))
    return padded.reshape(-(-n // rows), rows, -(-k // columns), columns).sum(axis=(1, 3))


def rounded(weight: jax.Array, steps: Steps, stored: Scaled) -> jax.Array:
    """Returns a weight [n, k] as it is once it is stored with these steps."""
    scale, zero = stored.spread(steps, weight.shape)
    return stored.values(stored.nearest(weight, scale, zero), scale, zero)


def refit(weight: jax.Array, levels: jax.Array, heed: jax.Array, steps: Steps, stored: Scaled) -> Steps:
    """Returns the steps whose scale brings levels [n, k] closest to a weight, by least squares.

    heed: how much each weight counts, [n, k]. Zero points stay, and so do scales of blocks whose levels are all zero.
    """
    _, zero = stored.spread(steps, weight.shape)
    square = block_sum(heed * jnp.square(levels - zero), stored)
    scale = block_sum(heed * weight * (levels - zero), stored) / jnp.where(square > 0, square, 1)
    scale = scale if steps.outer is None else scale * steps.outer
    scale = jnp.where(square > 0, scale, steps.scale if steps.outer is None else steps.scale * steps.outer)
    return stored.rounded(scale, steps.zero, steps.outer)


def better(wins: jax.Array, new: Steps, old: Steps) -> Steps:
    """Returns the new steps of the blocks that win, and the old ones of the others."""
    return jax.tree.map(lambda a, b: jnp.where(wins, a, b) if jnp.ndim(a) else b, new, old)


def output_error(weight: jax.Array, stands_for: jax.Array, gram: Any) -> jax.Array:
    """Returns the squared error of the products with all tokens seen, tr((w - r) X^T X (w - r)^T)."""
    difference = weight - stands_for
    return jnp.sum((difference @ gram) * difference)
