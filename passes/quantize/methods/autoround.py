"""AutoRound: signed gradient descent on what is added before rounding and on where ranges are clipped.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent", https://arxiv.org/abs/2309.05516.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xlathe.passes.quantize.methods.grid import Grid, Params

STEPS = 200


class Tuned(NamedTuple):
    """What is learned of one weight: `shift` [n, k], added before rounding, in steps; `low`, `high` [n, k / group], by
    how much the range of each group is multiplied, 0 to 1.
    """

    shift: jax.Array
    low: jax.Array
    high: jax.Array


def start(weight: jax.Array, grid: Grid) -> Tuned:
    """Returns what rounds to nearest."""
    ones = jnp.ones((weight.shape[0], weight.shape[1] // grid.group), weight.dtype)
    return Tuned(jnp.zeros_like(weight), ones, ones)


def params_of(weight: jax.Array, tuned: Tuned, grid: Grid) -> Params:
    """Returns scales and zero points of the clipped ranges."""
    low, high = grid.extent(weight)
    return grid.span(low * jnp.clip(tuned.low, 0, 1), high * jnp.clip(tuned.high, 0, 1))


def rounded(weight: jax.Array, tuned: Tuned, grid: Grid) -> jax.Array:
    """Returns the weight [n, k] as it is rounded; gradients pass straight through rounding."""
    return grid.nearest(weight, params_of(weight, tuned, grid), tuned.shift)


@functools.partial(jax.jit, static_argnames=("loss", "steps"))
def tune(tuned: Any, loss: Callable[..., jax.Array], *arguments: Any, steps: int = STEPS) -> tuple[Any, jax.Array]:
    """Returns the iterate with the least loss, and that loss.

    tuned: where to start, any tree. loss: of the tree, the number of the step and `arguments`. The rate falls in a
    line from 1 / steps to 0, so that no shift moves by more than a half in all.
    """
    optimizer = optax.sign_sgd(optax.linear_schedule(1 / steps, 0.0, steps))

    def step(state: tuple[Any, Any, Any, jax.Array], number: jax.Array) -> tuple[tuple[Any, Any, Any, jax.Array], None]:
        tuned, memory, best, least = state
        found, gradient = jax.value_and_grad(loss)(tuned, number, *arguments)
        best = jax.tree.map(lambda new, old: jnp.where(found < least, new, old), tuned, best)
        updates, memory = optimizer.update(gradient, memory, tuned)
        return (optax.apply_updates(tuned, updates), memory, best, jnp.minimum(found, least)), None

    least = loss(tuned, jnp.asarray(0), *arguments)
    (_, _, best, least), _ = jax.lax.scan(step, (tuned, optimizer.init(tuned), tuned, least), jnp.arange(steps))
    return best, least
