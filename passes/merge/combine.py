"""Weighted sums of tensors, and the products of all pairs: all that averages on lines and on spheres need of them.

Tensors are of one shape and any float dtype; they are read as float32, and the result is float32.
"""

import functools
import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 4096
"""Products are summed in float32 over so many numbers, and over chunks in float64."""


def combine(tensors: Sequence[jax.Array], coefficients: Sequence[float] | np.ndarray) -> jax.Array:
    """Returns the sum of coefficient times tensor, float32 [...].

    coefficients: a number a tensor, or float [n, rows], one for each row, the first axis of a tensor.
    """
    factors = np.asarray(coefficients, np.float32)
    return _combine(list(tensors), jnp.asarray(factors))


@jax.jit
def _combine(tensors: Sequence[jax.Array], coefficients: jax.Array) -> jax.Array:
    shape = (*coefficients.shape[1:], *[1] * (tensors[0].ndim - coefficients.ndim + 1))
    terms = [c.reshape(shape) * t.astype(jnp.float32) for c, t in zip(coefficients, tensors, strict=True)]
    return add(terms)


def add[Array: (jax.Array, np.ndarray)](terms: Iterable[Array]) -> Array:
    """Returns the sum of arrays, of which there is at least one, in their order."""
    return functools.reduce(operator.add, terms)


def gram(tensors: Sequence[jax.Array], *, rows: bool = False) -> np.ndarray:
    """Returns the inner products of all pairs of tensors, float64 [n, n]; with `rows`, of each of their rows
    (the first axis) by itself, [rows, n, n]."""
    return np.asarray(_partial_products(list(tensors), rows), np.float64).sum(axis=-3)


@jax.jit(static_argnums=1)
def _partial_products(tensors: Sequence[jax.Array], rows: bool) -> jax.Array:
    """Returns float32 [(rows,) chunks, n, n]."""
    outer = tensors[0].shape[:1] if rows else ()
    if tensors[0].size == 0:
        return jnp.zeros((*outer, 1, len(tensors), len(tensors)))
    flat = [t.astype(jnp.float32).reshape(*outer, -1) for t in tensors]
    width = min(CHUNK, max(flat[0].shape[-1], 1))
    padded = [jnp.pad(t, [*[(0, 0)] * len(outer), (0, -t.shape[-1] % width)]) for t in flat]
    chunks = [t.reshape(*outer, -1, width) for t in padded]
    return jnp.stack([jnp.stack([(a * b).sum(axis=-1) for b in chunks], axis=-1) for a in chunks], axis=-2)
