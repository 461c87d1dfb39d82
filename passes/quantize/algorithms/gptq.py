"""GPTQ: the error of rounding one column is made good by the columns that are not rounded yet.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, after Optimal Brain Surgeon (Hassibi & Stork 1993).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from xlathe.errors import PassError
from xlathe.storage import Scaled, Steps

BLOCK = 128
DAMPING = (0.01, 0.1, 1.0)
"""What is added to the diagonal, in units of its mean: the first with which the matrix has a Cholesky factor."""
LEAF = 64
"""Of the Cholesky factor. BLAS shares out products by the number of threads; where sizes are multiples of this, sums
are the same ones."""
AT_ONCE = 1 << 24
"""Weights whose columns are rounded at once: rows of a weight do not depend on each other."""


class Factor(NamedTuple):
    """Upper triangular U with U^T U = (H / mean(diag H) + damping * I)^-1, float64 [k, k]."""

    upper: np.ndarray
    damping: float


class Rounded(NamedTuple):
    """levels: [n, k]. moved: the weights as they were when their column was rounded, [n, k]. damping: that was used."""

    levels: jax.Array
    moved: jax.Array
    damping: float


def inverse_factor(gram: np.ndarray, order: np.ndarray | None = None) -> Factor:
    """Factors the damped inverse of a Hessian X^T X, float64 [k, k], in one copy of it.

    order: int [k], of its rows and columns. Its unit is the mean of its diagonal without zeros, which no level depends
    on and float32 may not reach.

    A channel that was always zero (H_jj = 0) gets one unit there: it shares nothing with the others and is rounded to
    nearest. (The paper's code sets its weights to zero, which other tokens than the calibration's would notice.)
    Raises PassError where no damping helps: the matrix is no sum of squares, or not finite.
    """
    gram = np.asarray(gram, np.float64)
    diagonal, size = np.diagonal(gram), len(gram)
    if not np.isfinite(gram.sum()) or (diagonal < 0).any():
        raise PassError("the sum of x^T x is not finite, or has a negative diagonal")
    # H = R R^T with R upper triangular is the lower factor of H read backwards; then U = R^-1.
    backwards = (np.arange(size) if order is None else order)[::-1]
    for damping in DAMPING:
        hessian = _padded(gram, backwards, damping)
        try:
            _invert_factor(hessian)
        except np.linalg.LinAlgError:
            continue
        return Factor(hessian[:size, :size][::-1, ::-1], damping)
    raise PassError(f"the sum of x^T x is singular: no Cholesky factor with {', '.join(map(str, DAMPING))} of its mean "
                    "diagonal added")  # fmt: skip


def _padded(gram: np.ndarray, order: np.ndarray, damping: float) -> np.ndarray:
    """Returns the Hessian in its unit, damped, in some order; a unit matrix follows up to a multiple of `LEAF`."""
    size = len(gram)
    hessian = np.eye(size + -size % LEAF)
    for i, row in enumerate(order):
        hessian[i, :size] = gram[row, order]
    diagonal = hessian[np.diag_indices(size)]
    live = diagonal > 0
    if live.any():
        hessian[:size, :size] /= diagonal[live].mean()
    hessian[np.diag_indices(size)] += np.where(live, 0, 1) + damping
    return hessian


def _invert_factor(matrix: np.ndarray) -> None:
    """Replaces a symmetric matrix by the inverse of its lower Cholesky factor; LinAlgError where it has none."""
    size = len(matrix)
    if size <= LEAF:
        (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), (matrix,))
        matrix[:] = invert(np.linalg.cholesky(matrix), lower=1)[0]
        return
    half = (size // LEAF + 1) // 2 * LEAF
    first, second, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert_factor(first)
    factor = below @ first.T
    second -= factor @ factor.T
    _invert_factor(second)
    np.matmul(factor, first, out=below)
    below[:] = -(second @ below)
    matrix[:half, half:] = 0


def gptq(
    weight: Any, gram: np.ndarray, stored: Scaled, steps: Steps, *, act_order: bool = True, block: int = BLOCK
) -> Rounded:
    """Returns the level of each weight, of what it is the nearest one, and the damping that was used.

    weight: floating [n, k]. gram: X^T X, [k, k]. steps: of all blocks; they do not change on the way (static groups),
    so that act_order, which rounds the columns with the largest activations first, needs no order of columns at run
    time. block: columns whose errors are passed on at once; it does not change the result.
    Raises PassError as `inverse_factor` does.
    """
    weight = jnp.asarray(weight)
    n, k = weight.shape
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(k)
    upper, damping = inverse_factor(gram, order)
    factor = jnp.asarray(upper, weight.dtype)
    del upper
    height = rows_at_once(k, stored)
    found = []
    for i in range(0, n, height):
        own = steps_of(steps, stored, i, i + height)
        found.append(jax.block_until_ready(_sweep(weight[i : i + height], order, factor, own, stored, block)))
    levels, moved = found[0] if len(found) == 1 else map(jnp.concatenate, zip(*found, strict=True))
    return Rounded(levels, moved, damping)


def rows_at_once(k: int, stored: Scaled | None) -> int:
    """Returns how many rows of a weight [n, k] are rounded at once, none of whose scales others share."""
    unit = max(stored.rows, 1) if stored is not None else 1
    return max(AT_ONCE // k // unit, 1) * unit


def steps_of(steps: Steps, stored: Scaled, start: int, end: int) -> Steps:
    """Returns the steps of some rows of a weight."""
    if not stored.rows:
        return steps
    own = slice(start // stored.rows, -(-end // stored.rows))
    return Steps(steps.scale[own], None if steps.zero is None else steps.zero[own], steps.outer)


@functools.partial(jax.jit, static_argnames=("stored", "block"))
def _sweep(
    weight: jax.Array,  # [n, k]
    order: jax.Array,  # [k], in which columns are rounded
    factor: jax.Array,  # [k, k], upper triangular
    steps: Steps,
    stored: Scaled,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the levels and what they are nearest to, [n, k]."""
    n, k = weight.shape
    padding = -k % block
    rows = jnp.pad(weight.T[order], ((0, padding), (0, 0)))  # columns of the weight in order, [k, n]
    place = jnp.pad(order // (stored.columns or k), (0, padding))  # of each column's steps
    scale, zero = steps_by_block(steps, stored, n, k)
    factor = jnp.pad(factor, (0, padding)) + jnp.diag(jnp.arange(k + padding) >= k) if padding else factor

    def one_block(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, levels = state  # a row stays what it was when it was rounded
        start = number * block
        inside = jax.lax.dynamic_slice_in_dim(rows, start, block)
        across = jax.lax.dynamic_slice_in_dim(factor, start, block)
        own = jax.lax.dynamic_slice_in_dim(across, start, block, axis=1)

        def one_column(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            inside, levels, errors = state
            own_steps = scale[place[start + i]], zero[place[start + i]]
            level = stored.nearest(inside[i], *own_steps)
            error = (inside[i] - stored.values(level, *own_steps)) / own[i, i]
            later = jnp.where(jnp.arange(block) > i, own[i], 0)
            return inside - later[:, None] * error, levels.at[start + i].set(level), errors.at[i].set(error)

        inside, levels, errors = jax.lax.fori_loop(0, block, one_column, (inside, levels, jnp.zeros_like(inside)))
        behind = jnp.where(jnp.arange(k + padding) >= start + block, across, 0)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, inside, start, 0)
        return rows - behind.T @ errors, levels

    rows, levels = jax.lax.fori_loop(0, (k + padding) // block, one_block, (rows, jnp.zeros_like(rows)))
    back = jnp.argsort(order)
    return levels[back].T, rows[back].T


def steps_by_block(steps: Steps, stored: Scaled, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns scale and zero of each row in each block of columns, [blocks, n]."""
    blocks = -(-k // stored.columns) if stored.columns else 1
    narrow = dataclasses.replace(stored, columns=1) if stored.columns else stored
    each = narrow.spread(steps, (n, blocks))
    scale, zero = (jnp.broadcast_to(array, (n, blocks)).T for array in each)
    return scale, zero
