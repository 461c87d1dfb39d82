"""Activations rounded before they are multiplied: what a scheme's `a=` stands for."""

import jax
import jax.numpy as jnp

from xlathe.storage.elements import FP8_E4M3

BLOCK = 32
"""`int8` rounds activations in blocks of so many; beside blocks of 256 weights, of as many."""
SMALLEST = 1e-30
"""Activations whose largest is not above this are rounded to zeros."""
INT8_MAX = 127
ACTIVATIONS = ("int8", "int8_token", "fp8_token", "int8_static", "fp8_static")
"""`int8`: a block; `_token`: one step a token; `_static`: one step for all, from calibration."""


def round_blocks(x: jax.Array, block: int = BLOCK) -> tuple[jax.Array, jax.Array]:
    """Rounds x [..., k] to 8 bits a block: float32 integers [..., k / block, block] and their step [..., k / block].

    The largest magnitude becomes 127. Ties go to even.
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    largest = jnp.abs(blocks).max(axis=-1)
    inverse = jnp.where(largest > SMALLEST, INT8_MAX / largest, 0)
    return jnp.round(blocks * inverse[..., None]), largest * jnp.float32(1 / INT8_MAX)


def round_tokens(x: jax.Array, activations: str, *step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds x [..., k] to the levels of int8 or of fp8 e4m3: float32 [..., k], and their step [..., 1].

    The largest magnitude of a token becomes the largest level, 127 or 448; or `step`, float32 [], is given, and what is
    beyond the largest level becomes it. Ties go to even. The step of a token with a NaN is NaN.
    """
    wide, whole = x.astype(jnp.float32), activations.startswith("int8")
    last = INT8_MAX if whole else FP8_E4M3.largest
    if step:
        inverse = jnp.where(step[0] > SMALLEST, 1 / step[0], 0)
        steps = jnp.broadcast_to(step[0], (*x.shape[:-1], 1))
    else:
        largest = jnp.abs(wide).max(axis=-1, keepdims=True)
        inverse, steps = jnp.where(largest > SMALLEST, last / largest, 0), largest * jnp.float32(1 / last)
    scaled = wide * inverse
    steps = jnp.where(jnp.isnan(wide).any(axis=-1, keepdims=True), jnp.nan, steps)  # no level is one
    return (jnp.clip(jnp.round(scaled), -last, last) if whole else FP8_E4M3.nearest(scaled)), steps
