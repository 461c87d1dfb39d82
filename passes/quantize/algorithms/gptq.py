"""GPTQ: the error of rounding one column is made good by the columns that are not rounded yet.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, after Optimal Brain Surgeon (Hassibi & Stork 1993).
"""

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


class Factor(NamedTuple):
    """Upper triangular U with U^T U = (H / mean(diag H) + damping * I)^-1, float64 [k, k]."""

    upper: np.ndarray
    damping: float


def inverse_factor(gram: np.ndarray) -> Factor:
    """Factors the damped inverse of a Hessian X^T X, float64 [k, k], without forming the inverse.

    Its unit is the mean of its diagonal, which no level depends on and float32 may not reach.

    A channel that was always zero (H_jj = 0) gets H_jj = 1: it shares nothing with the others and is rounded to
    nearest. (The paper's code sets its weights to zero, which other tokens than the calibration's would notice.)
    Raises PassError where no damping helps: the matrix is no sum of squares, or not finite.
    """
    hessian = np.array(gram, np.float64)
    diagonal = np.diagonal(hessian)
    if not np.isfinite(hessian).all() or (diagonal < 0).any():
        raise PassError("the sum of x^T x of the calibration is not finite, or has a negative diagonal")
    hessian[np.diag_indices_from(hessian)] = np.where(diagonal == 0, 1.0, diagonal)
    hessian /= np.diagonal(hessian).mean()
    for damping in DAMPING:
        damped = hessian + damping * np.eye(len(hessian))
        try:
            # H = R R^T with R upper triangular is the lower factor of H read backwards; then U = R^-1.
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        return Factor(scipy.linalg.solve_triangular(upper, np.eye(len(hessian))), damping)
    raise PassError(f"the sum of x^T x of the calibration has no Cholesky factor, with damping up to {DAMPING[-1]}")


def gptq(
    weight: Any, gram: np.ndarray, stored: Scaled, steps: Steps, *, act_order: bool = True, block: int = BLOCK
) -> tuple[jax.Array, float]:
    """Returns the level of each weight, [n, k], and the damping that was used.

    weight: floating [n, k]. gram: X^T X, [k, k]. steps: of all blocks; they do not change on the way (static groups),
    so that act_order, which rounds the columns with the largest activations first, needs no order of columns at run
    time. block: columns whose errors are passed on at once; it does not change the result.
    Raises PassError as `inverse_factor` does.
    """
    weight = jnp.asarray(weight)
    n, k = weight.shape
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(k)
    upper, damping = inverse_factor(np.asarray(gram)[np.ix_(order, order)])
    padding = -k % block

    def in_order(array: Any) -> jax.Array:
        return jnp.pad(jnp.broadcast_to(array, (n, k)).T[order], ((0, padding), (0, 0)))

    factor = jnp.asarray(scipy.linalg.block_diag(upper, np.eye(padding)), weight.dtype)
    scale, zero = stored.spread(steps, (n, k))
    levels = _sweep(in_order(weight), factor, in_order(scale), in_order(zero), stored, block)
    return levels[np.argsort(order)].T, damping


@functools.partial(jax.jit, static_argnames=("stored", "block"))
def _sweep(
    rows: jax.Array,  # [k, n], the columns of the weight in the order in which they are rounded
    factor: jax.Array,  # [k, k], upper triangular
    scale: jax.Array,  # [k, n]
    zero: jax.Array,  # [k, n]
    stored: Scaled,
    block: int,
) -> jax.Array:
    """Returns the levels, [k, n]."""
    count = rows.shape[0]

    def one_block(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, levels = state
        start = number * block
        inside = jax.lax.dynamic_slice_in_dim(rows, start, block)
        across = jax.lax.dynamic_slice_in_dim(factor, start, block)
        own = jax.lax.dynamic_slice_in_dim(across, start, block, axis=1)

        def one_column(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            inside, levels, errors = state
            steps = scale[start + i], zero[start + i]
            level = stored.nearest(inside[i], *steps)
            error = (inside[i] - stored.values(level, *steps)) / own[i, i]
            later = jnp.where(jnp.arange(block) > i, own[i], 0)
            return inside - later[:, None] * error, levels.at[start + i].set(level), errors.at[i].set(error)

        _, levels, errors = jax.lax.fori_loop(0, block, one_column, (inside, levels, jnp.zeros_like(inside)))
        behind = jnp.where(jnp.arange(count) >= start + block, across, 0)
        return rows - behind.T @ errors, levels

    return jax.lax.fori_loop(0, count // block, one_block, (rows, jnp.zeros_like(rows)))[1]
