"""Averages weighed by what a model saw: Fisher information, and RegMean's sums of products of activations."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from xlathe.passes.merge.combine import add


@jax.jit
def fisher(tensors: Sequence[jax.Array], information: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean of numbers, each weighed by its information; the plain mean where that is 0 in all models
    (Matena and Raffel 2022, arXiv 2111.09832).

    information: float32 [...] a model, the mean square of the gradients of log p, not negative.
    """
    total = add(information)
    weighed = add(f * t.astype(jnp.float32) for f, t in zip(information, tensors, strict=True))
    plain = add(t.astype(jnp.float32) for t in tensors) / len(tensors)
    return jnp.where(total > 0, weighed / jnp.where(total > 0, total, 1), plain)


@jax.jit
def regmean(tensors: Sequence[jax.Array], grams: Sequence[jax.Array], shrink: float = 0.9) -> jax.Array:
    """Returns the weight float32 [n, k] whose products with the activations of each model are nearest to that model's
    own (RegMean: Jin et al. 2023, arXiv 2212.09849).

    tensors: [n, k] a model, y = x w^T; grams: x^T x float32 [k, k] of each. shrink: factor of what is off the diagonal.
    A column that no model activates gets the plain mean.
    """
    shrunk = [shrink * g + (1 - shrink) * jnp.diag(jnp.diag(g)) for g in grams]
    total = add(shrunk)
    dead = jnp.diag(total) == 0
    ridge = jnp.where(dead, 1.0, 1e-7 * jnp.diag(total).mean())
    mean = add(t.astype(jnp.float32) for t in tensors) / len(tensors)
    right = add((t.astype(jnp.float32) - mean) @ g for t, g in zip(tensors, shrunk, strict=True))
    solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(total + jnp.diag(ridge)), right.T).T
    return mean + jnp.where(dead, 0, solved)
