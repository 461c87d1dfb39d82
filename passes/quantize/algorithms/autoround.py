"""AutoRound: signed gradient descent on what is added before rounding and on where ranges are clipped.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent", https://arxiv.org/abs/2309.05516.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xlathe.storage import Scaled, Steps

STEPS = 200


class Tuned(NamedTuple):
    """What is learned of one weight: `shift` [n, k], added before rounding, in levels; `low`, `high`, by how much the
    range of each block is multiplied, 0 to 1.
    """

    shift: jax.Array
    low: jax.Array
    high: jax.Array


def start(weight: jax.Array, stored: Scaled) -> Tuned:
    """Returns what rounds to nearest."""
    ones = jnp.ones_like(stored.bounds(weight)[0])
    return Tuned(jnp.zeros_like(weight), ones, ones)


def clipped(weight: jax.Array, tuned: Tuned, stored: Scaled) -> Steps:
    """Returns the steps of the clipped ranges, as they are stored; gradients are those before they were rounded."""
    low, high = (bound * jnp.clip(c, 0, 1) for bound, c in zip(stored.bounds(weight), tuned[1:], strict=True))
    exact, steps = stored.fit(weight), stored.steps(low, high)
    if stored.zero:
        scale = (high - low) / stored.levels.largest
        zero = -low / jnp.where(scale == 0, 1, scale)
        return Steps(_through(steps.scale, scale), _through(steps.zero, zero))
    longer = jnp.where(-low >= high, tuned.low, tuned.high)
    return Steps(_through(steps.scale, exact.scale * jnp.clip(longer, 0, 1)), None, steps.outer)


def choose(weight: jax.Array, tuned: Tuned, stored: Scaled) -> tuple[jax.Array, Steps]:
    """Returns levels [n, k] and steps; gradients pass straight through rounding, but not where a level is the last."""
    steps = clipped(weight, tuned, stored)
    scale, zero = stored.spread(steps, weight.shape)
    exact = weight / jnp.where(scale == 0, 1, scale) + zero + tuned.shift
    levels = stored.levels.nearest(jax.lax.stop_gradient(exact))
    inside = jnp.abs(levels - exact) <= 1
    return _through(levels, jnp.where(inside, exact, jax.lax.stop_gradient(exact))), steps


def stands_for(weight: jax.Array, tuned: Tuned, stored: Scaled) -> jax.Array:
    """Returns the weight [n, k] as it is rounded; it is differentiable in `tuned`."""
    levels, steps = choose(weight, tuned, stored)
    return stored.values(levels, *stored.spread(steps, weight.shape))


def _through(value: jax.Array, exact: jax.Array) -> jax.Array:
    """Returns `value`, with the gradient of what was rounded to it."""
    return exact + jax.lax.stop_gradient(value - exact)


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
