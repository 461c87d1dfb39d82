"""Sums of changes from a base model: what task arithmetic, TIES, DARE, DELLA and breadcrumbs do once numbers were
dropped (`masks`), and the methods that choose by comparing models, SCE and nearswap. float32 throughout."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.passes.merge.combine import add, combine
from xlathe.passes.merge.masks import kept_count, marks
from xlathe.passes.merge.ranks import Band, find_whole_band


@jax.jit
def change(tensor: jax.Array, base: jax.Array) -> jax.Array:
    """Returns what a model changed, float32, whatever the dtypes are."""
    return tensor.astype(jnp.float32) - base.astype(jnp.float32)


def summed(deltas: Sequence[jax.Array], weights: Sequence[float], *, normalize: bool = False) -> jax.Array:
    """Returns the weighted sum of changes, divided by the sum of weights where `normalize` (Ilharco et al. 2023,
    arXiv 2212.04089)."""
    return combine(deltas, np.asarray(weights) / (np.sum(weights) if normalize else 1))


def elected(deltas: Sequence[jax.Array], weights: Sequence[float], *, normalize: bool = True) -> jax.Array:
    """Returns the weighted sum of those changes whose sign is that of the weighted sum of all, + where that is 0; where
    `normalize`, divided by the sum of their weights' magnitudes (TIES: Yadav et al. 2023, arXiv 2306.01708).

    A negative weight turns its change around before signs are compared, so that the result has the elected sign.
    """
    return _elected(list(deltas), jnp.asarray(weights, jnp.float32), normalize)


@functools.partial(jax.jit, static_argnums=2)
def _elected(deltas: Sequence[jax.Array], weights: jax.Array, normalize: bool) -> jax.Array:
    terms = [w * d for w, d in zip(weights, deltas, strict=True)]
    total = add(terms)
    agree = [jnp.where(total < 0, term < 0, term > 0) for term in terms]
    merged = add(jnp.where(a, term, 0) for a, term in zip(agree, terms, strict=True))
    if not normalize:
        return merged
    count = add(jnp.where(a, jnp.abs(w), 0) for a, w in zip(agree, weights, strict=True))
    return merged / jnp.where(count > 0, count, 1)


def sce(deltas: Sequence[jax.Array], *, select: float = 1.0) -> jax.Array:
    """Selects the share of numbers that vary most between models, weighs each model by the mean square of its changes
    there, and erases those against the sign of the sum (SCE: Wan et al. 2024, arXiv 2408.07990).

    Numbers that vary as much as the last one chosen are chosen as well, so that no order of numbers matters.
    """
    count = kept_count(deltas[0].size, select)
    band = find_whole_band(lambda: [variance(deltas)], 0, count) if count < deltas[0].size else Band()
    chosen = marks(variance(deltas), band)
    return weighed(deltas, chosen, shares(energies(deltas, chosen)))


@jax.jit
def variance(deltas: Sequence[jax.Array]) -> jax.Array:
    """Returns the variance of each number over models."""
    mean = add(deltas) / len(deltas)
    return add((d - mean) ** 2 for d in deltas) / len(deltas)


@jax.jit
def energies(deltas: Sequence[jax.Array], chosen: jax.Array) -> jax.Array:
    """Returns each model's sum of squares over what is chosen, float32 [n]."""
    return jnp.stack([(jnp.where(chosen, d, 0) ** 2).sum() for d in deltas])


def shares(energies: Any) -> np.ndarray:
    """Returns the weights of models by their energies: equal ones where nothing changed."""
    found = np.asarray(energies, np.float64)
    return found / found.sum() if found.sum() > 0 else np.full(len(found), 1 / len(found))


@jax.jit
def weighed(deltas: Sequence[jax.Array], chosen: jax.Array, weights: Any) -> jax.Array:
    """Returns the weighted mean of the changes that are chosen and have the sign of the sum of all of these."""
    kept = [jnp.where(chosen, d, 0) for d in deltas]
    sign = add(kept)
    agree = [jnp.where(sign < 0, d < 0, d > 0) for d in kept]
    merged = add(jnp.where(a, w * d, 0) for a, w, d in zip(agree, weights, kept, strict=True))
    total = add(jnp.where(a, w, 0) for a, w in zip(agree, weights, strict=True))
    return merged / jnp.where(total > 0, total, 1)


@jax.jit
def nearswap(base: jax.Array, other: jax.Array, t: float) -> jax.Array:
    """Moves each number of the base to the other model's by the share t / |difference|, at most all the way: near ones
    are swapped, far ones hardly move."""
    start, difference = base.astype(jnp.float32), change(other, base)
    distance = jnp.abs(difference)
    share = jnp.where(distance > t, t / jnp.where(distance > 0, distance, 1), 1)
    return start + share * difference
