"""Half-quadratic quantization: steps that heed outliers less, without any calibration.

Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/. It minimizes sum |w - r|^p, p < 1, by splitting off an
error e: e is a shrinkage of w - r (the generalized soft threshold), and then one number a block fits w - e.
"""

import functools

import jax
import jax.numpy as jnp

from xlathe.passes.quantize.algorithms.blocks import better, block_sum, refit, rounded
from xlathe.storage import Scaled, Steps

NORM = 0.7
BETA = 10.0
ITERATIONS = 20


@functools.partial(jax.jit, static_argnames="stored")
def hqq(weight: jax.Array, stored: Scaled) -> Steps:
    """Returns the steps of each block of a weight, floating [n, k].

    The published method moves a zero point that need not be whole (formats with `z=bf16` or `z=f16`). Where there is
    none, or a whole one, it is the scale that moves, by the same splitting. The best iterate by the p-norm stays.
    """

    def loss(steps: Steps) -> jax.Array:
        return block_sum(jnp.abs(weight - rounded(weight, steps, stored)) ** NORM, stored)

    def step(state: tuple[Steps, Steps, jax.Array], _: None) -> tuple[tuple[Steps, Steps, jax.Array], None]:
        steps, best, least = state
        scale, zero = stored.spread(steps, weight.shape)
        levels = stored.nearest(weight, scale, zero)
        target = weight - shrink(weight - stored.values(levels, scale, zero))
        if stored.zero in ("", "u8"):
            steps = refit(target, levels, jnp.ones_like(weight), steps, stored)
        else:
            offset = levels - target / jnp.where(scale == 0, 1, scale)
            steps = stored.rounded(steps.scale, block_sum(offset, stored) / block_sum(jnp.ones_like(weight), stored))
        found = loss(steps)
        return (steps, better(found < least, steps, best), jnp.minimum(found, least)), None

    start = stored.fit(weight)
    return jax.lax.scan(step, (start, start, loss(start)), length=ITERATIONS)[0][1]


def shrink(x: jax.Array) -> jax.Array:
    """The generalized soft threshold sign(x) relu(|x| - |x|^(p - 1) / beta)."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(size - jnp.where(size > 0, size, 1) ** (NORM - 1) / BETA, 0)
