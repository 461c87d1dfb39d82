"""Which numbers of a change are kept: by size, by chance, or by chance that depends on size. float32 throughout."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from xlathe.passes.merge.ranks import Band, find_band

Rescale = Literal["none", "keep_prob", "l1"]
"""How what is kept makes up for what is not: not at all; divided by the probability to be kept, so that the mean
stays; or times what restores the sum of magnitudes."""


def marks(values: jax.Array, band: Band, start: int = 0) -> jax.Array:
    """Says which numbers have a magnitude in the band: bool [...]. start: the place of the first one in all."""
    end, begin = (min(max(place - start, 0), (1 << 31) - 1) for place in (band.end, band.start))
    return _marks(values, band.least, end, band.most, begin)


@jax.jit
def _marks(values: jax.Array, least: int, end: int, most: int, begin: int) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.int32) & 0x7FFFFFFF
    place = jnp.arange(bits.size, dtype=jnp.int32).reshape(bits.shape)
    low = (bits > least) | ((bits == least) & (place < end))
    return low & ~((bits > most) | ((bits == most) & (place < begin)))


def by_size(delta: jax.Array, *, density: float, rescale: Rescale = "none") -> jax.Array:
    """Keeps the share `density` of largest magnitude, at least one number (Yadav et al. 2023, arXiv 2306.01708)."""
    return _ranked(delta, kept_count(delta.size, density), 0, density, rescale)


def without_outliers(delta: jax.Array, *, density: float, gamma: float = 0.01, rescale: Rescale = "none") -> jax.Array:
    """Drops the share `gamma` of largest magnitude and keeps the share `density` of largest among the others
    (breadcrumbs: Davari and Belilovsky 2023, arXiv 2312.06795).

    Where gamma is less than one number, none is dropped, nor more than the density leaves.
    """
    top, count = places(delta.size, density, gamma)
    return _ranked(delta, count, top, density, rescale)


def _ranked(delta: jax.Array, count: int, top: int, density: float, rescale: Rescale) -> jax.Array:
    """Keeps the `count` numbers of largest magnitude after the `top` largest."""
    return _marked(delta, marks(delta, find_band(lambda: [delta], top, count)), density, rescale)


@functools.partial(jax.jit, static_argnames="rescale")
def _marked(delta: jax.Array, marked: jax.Array, density: float, rescale: Rescale) -> jax.Array:
    return _rescaled(delta, jnp.where(marked, delta, 0), density, rescale)


@functools.partial(jax.jit, static_argnames="rescale")
def by_chance(
    key: jax.Array, delta: jax.Array, *, density: float, rescale: Rescale = "keep_prob", row: int = 0
) -> jax.Array:
    """Keeps each number with the probability `density` (DARE: Yu et al. 2024, arXiv 2311.03099).

    row: the place of the first row, the last axis, in the whole: draws depend on the key and on places alone.
    """
    kept = jnp.where(_draws(key, delta, row) < density, delta, 0)
    return _rescaled(delta, kept, density, rescale)


@functools.partial(jax.jit, static_argnames="rescale")
def by_chance_and_size(
    key: jax.Array,
    delta: jax.Array,
    *,
    density: float,
    epsilon: float = 0.15,
    rescale: Rescale = "keep_prob",
    row: int = 0,
) -> jax.Array:
    """Keeps each number with a probability that rises with its rank in its row, the last axis, from density - epsilon
    to density + epsilon (DELLA: Deep et al. 2024, arXiv 2406.11617); equal ones by their place.

    Rows of one number have the probability `density`. row: as of `by_chance`.
    """
    if delta.size == 0:
        return delta
    width = delta.shape[-1] if delta.ndim else 1
    ranks = jnp.argsort(jnp.argsort(jnp.abs(delta).reshape(-1, width), axis=-1), axis=-1)
    share = ranks.astype(jnp.float32) / max(width - 1, 1) if width > 1 else jnp.full(ranks.shape, 0.5)
    chance = (density - epsilon + 2 * epsilon * share).reshape(delta.shape)
    kept = jnp.where(_draws(key, delta, row) < chance, delta, 0)
    return _rescaled(delta, kept, chance, rescale)


def _draws(key: jax.Array, like: jax.Array, row: int) -> jax.Array:
    """Returns numbers between 0 and 1, each row's by a key of its own."""
    width = like.shape[-1] if like.ndim else 1
    places = row + jnp.arange(like.size // max(width, 1))
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (width,)))(places).reshape(like.shape)


def kept_count(size: int, density: float) -> int:
    """Returns how many of `size` numbers a density keeps, at least one."""
    return max(int(density * size), 1)


def places(size: int, density: float, gamma: float) -> tuple[int, int]:
    """Returns how many of `size` numbers are outliers, and how many of the others a density keeps."""
    count = kept_count(size, density)
    return min(int(gamma * size), size - count), count


def _rescaled(delta: jax.Array, kept: jax.Array, chance: float | jax.Array, rescale: Rescale) -> jax.Array:
    if rescale == "keep_prob":
        return kept / chance
    if rescale == "l1":
        left = jnp.abs(kept).sum()
        return jnp.where(left > 0, kept * (jnp.abs(delta).sum() / jnp.where(left > 0, left, 1)), kept)
    return kept
