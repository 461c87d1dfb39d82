"""AutoRound: signed gradient descent on what is added before rounding and on where ranges end.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent", https://arxiv.org/abs/2309.05516.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xlathe.storage import Scaled, Steps

STEPS = 200


class Ranges(NamedTuple):
    """From where to where the levels of each block reach, float32 [blocks, blocks]: low <= 0 <= high."""

    low: jax.Array
    high: jax.Array


class Tuned(NamedTuple):
    """What is learned of one weight: `shift` [n, k], added before rounding, in levels; `low`, `high`, by how much the
    ends of the range of each block are multiplied.
    """

    shift: jax.Array
    low: jax.Array
    high: jax.Array


def start(weight: jax.Array, ranges: Ranges) -> Tuned:
    """Returns what rounds a weight [n, k] to nearest, in its ranges."""
    ones = jnp.ones_like(ranges.low)
    return Tuned(jnp.zeros_like(weight), ones, ones)


def ranges_of(steps: Steps, stored: Scaled) -> Ranges:
    """Returns the ranges of which a format makes these steps."""
    last = stored.levels.largest
    if stored.zero:
        return Ranges(-steps.zero * steps.scale, (last - steps.zero) * steps.scale)
    if stored.levels.bits == 8:
        return Ranges(jnp.zeros_like(steps.scale), last * steps.scale)
    end = -(last + 1) * steps.scale  # which has the sign of the weight that is largest
    return Ranges(jnp.minimum(end, 0), jnp.maximum(end, 0))


def clipped(ranges: Ranges, tuned: Tuned, stored: Scaled) -> Steps:
    """Returns the steps of the tuned ranges, as they are stored; gradients are those before they were rounded."""
    low, high = ranges.low * jnp.maximum(tuned.low, 0), ranges.high * jnp.maximum(tuned.high, 0)
    exact, steps = stored.steps(*ranges), stored.steps(low, high)
    if stored.zero:
        scale = (high - low) / stored.levels.largest
        zero = -low / jnp.where(scale == 0, 1, scale)
        return Steps(_through(steps.scale, scale), _through(steps.zero, zero))
    longer = jnp.where(-low >= high, tuned.low, tuned.high)
    return Steps(_through(steps.scale, exact.scale * jnp.maximum(longer, 0)), None, steps.outer)


def choose(weight: jax.Array, ranges: Ranges, tuned: Tuned, stored: Scaled) -> tuple[jax.Array, Steps]:
    """Returns levels [n, k] and steps; gradients pass straight through rounding, but not where a level is the last."""
    steps = clipped(ranges, tuned, stored)
    scale, zero = stored.spread(steps, weight.shape)
    exact = weight / jnp.where(scale == 0, 1, scale) + zero + tuned.shift
    levels = stored.levels.nearest(jax.lax.stop_gradient(exact))
    inside = jnp.abs(levels - exact) <= 1
    return _through(levels, jnp.where(inside, exact, jax.lax.stop_gradient(exact))), steps


def stands_for(weight: jax.Array, ranges: Ranges, tuned: Tuned, stored: Scaled) -> jax.Array:
    """Returns the weight [n, k] as it is rounded; it is differentiable in `tuned`."""
    levels, steps = choose(weight, ranges, tuned, stored)
    return stored.values(levels, *stored.spread(steps, weight.shape))


def _through(value: jax.Array, exact: jax.Array) -> jax.Array:
    """Returns `value`, with the gradient of what was rounded to it."""
    return exact + jax.lax.stop_gradient(value - exact)


def tune(
    tuned: Any, slope: Callable[[Any, jax.Array], tuple[jax.Array, Any]], steps: int = STEPS
) -> tuple[Any, jax.Array]:
    """Returns the iterate with the least loss, and that loss.

    tuned: where to start, any tree. slope: the loss of the tree and its gradient, in a step of some number. The rate
    falls in a line from 1 / steps to 0, so that no shift moves by more than a half in all.
    """
    optimizer = optax.sign_sgd(optax.linear_schedule(1 / steps, 0.0, steps))

    def step(state: tuple[Any, Any, Any, jax.Array], number: jax.Array) -> tuple[tuple[Any, Any, Any, jax.Array], None]:
        tuned, memory, best, least = state
        found, gradient = slope(tuned, number)
        best = jax.tree.map(lambda new, old: jnp.where(found < least, new, old), tuned, best)
        updates, memory = optimizer.update(gradient, memory, tuned)
        return (optax.apply_updates(tuned, updates), memory, best, jnp.minimum(found, least)), None

    dtype = jax.eval_shape(slope, tuned, jnp.asarray(0))[0].dtype
    begin = (tuned, optimizer.init(tuned), tuned, jnp.asarray(jnp.inf, dtype))
    (_, _, best, least), _ = jax.lax.scan(step, begin, jnp.arange(steps))
    return best, least
