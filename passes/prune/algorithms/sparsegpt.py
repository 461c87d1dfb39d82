"""SparseGPT: the error of a weight that becomes zero is made good by the columns behind it, and that of rounding
the others with it.

Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774 (3.5 for rounding); the inverse Hessian is GPTQ's.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.passes.prune.algorithms.sparsity import Sparsity, lowest
from xlathe.passes.quantize.algorithms.gptq import BLOCK, inverse_factor, rows_at_once, steps_by_block, steps_of
from xlathe.storage import Scaled, Steps


@functools.partial(jax.tree_util.register_dataclass, data_fields=["steps"], meta_fields=["stored"])
@final
@dataclasses.dataclass(frozen=True)
class Grid:
    """What weights that are kept are rounded to: levels, and the steps of all blocks of a weight."""

    stored: Scaled
    steps: Steps

    def levels(self, weight: Any) -> Any:
        """Returns the level nearest to each weight, [n, k]."""
        return self.stored.nearest(weight, *self.stored.spread(self.steps, weight.shape))


class _Hessian(NamedTuple):
    """Of X^T X: the factor of its inverse, [k, k]; which columns were always zero, bool [k]; the damping."""

    factor: jax.Array
    dead: np.ndarray
    damping: float


def sparsegpt(
    weight: Any, gram: np.ndarray, sparsity: Sparsity, *, grid: Grid | None = None, block: int = BLOCK
) -> tuple[jax.Array, float]:
    """Returns a weight with zeros, and the damping that was used.

    weight: floating [n, k], k a multiple of `sparsity.of`. gram: X^T X, [k, k]; a factor of it changes nothing. grid:
    what the others are rounded to, column by column; which become zero is chosen by what they are before. block:
    columns whose weights, in all rows, are compared with each other; with a pattern it does not change the result.
    A column whose activations were always zero goes first.
    Raises PassError as `inverse_factor` does.
    """
    weight = jnp.asarray(weight)
    hessian = _hessian(gram, weight.dtype)
    return _swept(weight, hessian, sparsity, grid, block), hessian.damping


def sparsegpt_rounded(
    weight: Any, gram: np.ndarray, sparsity: Sparsity, stored: Scaled, *, block: int = BLOCK
) -> tuple[jax.Array, Grid]:
    """Returns a weight with zeros, the others on a grid, and the grid, which just reaches what `sparsegpt` keeps
    without one. Raises PassError as `inverse_factor` does."""
    weight = jnp.asarray(weight)
    hessian = _hessian(gram, weight.dtype)
    grid = Grid(stored, stored.fit(np.asarray(_swept(weight, hessian, sparsity, None, block))))
    return _swept(weight, hessian, sparsity, grid, block), grid


def _hessian(gram: np.ndarray, dtype: Any) -> _Hessian:
    upper, damping = inverse_factor(gram)
    return _Hessian(jnp.asarray(upper, dtype), np.diagonal(gram) == 0, damping)


def _swept(weight: jax.Array, hessian: _Hessian, sparsity: Sparsity, grid: Grid | None, block: int) -> jax.Array:
    """With a pattern rows do not depend on each other, and go some at a time."""
    n, k = weight.shape
    block = min(block, k)
    if sparsity.of:
        block = -(-block // sparsity.of) * sparsity.of
    counts = sparsity.counts([n * min(block, k - i) for i in range(0, k, block)])
    height = rows_at_once(k, None if grid is None else grid.stored) if sparsity.of else n
    found = []
    for i in range(0, n, height):
        own = None if grid is None else Grid(grid.stored, steps_of(grid.steps, grid.stored, i, i + height))
        some = _sweep(weight[i : i + height], hessian.factor, hessian.dead, counts, own, sparsity, block)
        found.append(jax.block_until_ready(some))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


@functools.partial(jax.jit, static_argnames=("sparsity", "block"))
def _sweep(
    weight: jax.Array,  # [n, k]
    factor: jax.Array,  # [k, k], upper triangular
    dead: jax.Array,  # bool [k]
    counts: jax.Array,  # [blocks], zeros of each
    grid: Grid | None,
    sparsity: Sparsity,
    block: int,
) -> jax.Array:
    """Returns the weight with zeros, [n, k]."""
    n, k = weight.shape
    by_block = None if grid is None else steps_by_block(grid.steps, grid.stored, n, k)
    padding = -k % block
    size, columns = k + padding, jnp.arange(block)
    rows = jnp.pad(weight.T, ((0, padding), (0, 0)))  # columns of the weight, [k, n]
    factor = jnp.pad(factor, (0, padding)) + jnp.diag(jnp.arange(size) >= k) if padding else factor
    dead = jnp.pad(dead, (0, padding))

    def rounded(values: jax.Array, column: jax.Array) -> jax.Array:
        if grid is None or by_block is None:
            return values
        place = jnp.minimum(column, k - 1) // (grid.stored.columns or k)
        scale, zero = by_block[0][place], by_block[1][place]
        return grid.stored.values(grid.stored.nearest(values, scale, zero), scale, zero)

    def one_block(number: jax.Array, rows: jax.Array) -> jax.Array:
        start = number * block
        inside = jax.lax.dynamic_slice_in_dim(rows, start, block)
        across = jax.lax.dynamic_slice_in_dim(factor, start, block)
        own = jax.lax.dynamic_slice_in_dim(across, start, block, axis=1)
        places = start + columns
        weighed = jnp.where(dead[places], -jnp.inf, -2 * jnp.log(jnp.diagonal(own)))[:, None]

        def scores(values: jax.Array, weighed: jax.Array) -> jax.Array:
            """Returns log(w^2 / U_jj^2)."""
            return 2 * jnp.log(jnp.abs(values)) + weighed

        def chosen(values: jax.Array) -> jax.Array:
            """Returns which of all weights of the block become zero."""
            each = jnp.where((places < k)[:, None], scores(values, weighed), jnp.inf)
            return lowest(each.ravel(), counts[number]).reshape(values.shape)

        def chosen_of_group(i: jax.Array, inside: jax.Array, gone: jax.Array) -> jax.Array:
            """Adds which weights of the group that begins with column i become zero."""
            group, own_weighed = (jax.lax.dynamic_slice_in_dim(a, i, sparsity.of) for a in (inside, weighed))
            found = lowest(scores(group, own_weighed).T, sparsity.of - sparsity.keep).T
            return jax.lax.dynamic_update_slice_in_dim(gone, found, i, 0)

        def one_column(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            inside, gone, errors = state
            if sparsity.of:
                begins = i % sparsity.of == 0
                gone = jax.lax.cond(begins, chosen_of_group, lambda i, inside, gone: gone, i, inside, gone)
            value = jnp.where(gone[i], 0, rounded(inside[i], start + i))
            error = (inside[i] - value) / own[i, i]
            later = jnp.where(columns > i, own[i], 0)
            return inside.at[i].set(value) - later[:, None] * error, gone, errors.at[i].set(error)

        gone = jnp.zeros(inside.shape, bool) if sparsity.of else chosen(inside)
        inside, _, errors = jax.lax.fori_loop(0, block, one_column, (inside, gone, jnp.zeros_like(inside)))
        behind = jnp.where(jnp.arange(size) >= start + block, across, 0)
        return jax.lax.dynamic_update_slice_in_dim(rows, inside, start, 0) - behind.T @ errors

    return jax.lax.fori_loop(0, size // block, one_block, rows)[:k].T
