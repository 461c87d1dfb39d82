"""The softmax of rows whose scores come a block at a time (Milakov and Gimelshein 2018; Dao et al. 2022)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e30
"""A score that counts for nothing. Finite, so that a row which has seen no key yet makes no NaN."""


class Rows(NamedTuple):
    """What is known of some rows of softmax(scores) values after some of their keys.

    `one` is () on GPUs, whose registers hold a number a row, and (1,) on TPUs, whose registers have two axes.
    """

    highest: jax.Array  # float32 [rows, *one], the highest score
    total: jax.Array  # float32 [rows, *one], the sum of exp(score - highest)
    weighted: jax.Array  # float32 [rows, e], the sum of exp(score - highest) values


def absorb(
    rows: Rows,
    scores: jax.Array,  # float32 [rows, keys]
    keep: jax.Array | None,  # bool [rows, keys], or None for all
    weigh: Callable[[jax.Array], jax.Array],  # float32 [rows, keys] -> float32 [rows, e], the product with the values
) -> Rows:
    """Returns the rows after more keys; those that are not kept count for nothing, whatever their scores are."""
    keepdims = rows.highest.ndim == 2
    if keep is not None:
        scores = jnp.where(keep, scores, LOWEST)
    highest = jnp.maximum(rows.highest, jnp.max(scores, axis=1, keepdims=keepdims))
    fade = jnp.exp(rows.highest - highest)
    weights = jnp.exp(scores - _spread(highest, scores))
    if keep is not None:
        weights = jnp.where(keep, weights, 0.0)
    total = rows.total * fade + jnp.sum(weights, axis=1, keepdims=keepdims)
    return Rows(highest, total, rows.weighted * _spread(fade, rows.weighted) + weigh(weights))


def finish(rows: Rows) -> jax.Array:
    """Returns the means of the values, float32 [..., rows, e]; zeros for a row that kept no key."""
    return rows.weighted / _spread(jnp.where(rows.total == 0, 1.0, rows.total), rows.weighted)


def _spread(column: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(column, like.shape, tuple(range(column.ndim)))
