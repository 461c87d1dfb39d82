"""A product with a quantized weight."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from xlathe.op import op

MIDDLE = 8
"""The zero point of symmetric 4-bit codes."""
BLOCK = 32
"""Activations are rounded to 8 bits in blocks of so many."""
PARTS = 16
"""Partial sums of a product with rounded activations."""
SMALLEST = 1e-30
"""A block of activations whose largest is not above this is rounded to zeros."""


@op("quantized_dot")
def quantized_dot(
    x: jax.Array,  # [..., k]
    codes: jax.Array,  # int8 [n, k]; or with bits=4 uint8 [n, k / 2], two a byte
    scale: jax.Array,  # float32 [n]; or with a group bfloat16 [n, k / group]
    *zero: jax.Array,  # uint8 [n, k / group], if the codes are asymmetric
    out_dtype: str,
    bits: int = 8,
    group: int | None = None,
    activations: str | None = None,
) -> jax.Array:  # [..., n]
    """x w^T in float32, where w is what the codes stand for.

    bits: 8, symmetric with one scale a row: (x codes^T) * scale; or 4, in groups: w is `dequantize` of them.
    activations: None, not rounded; or `int8`, rounded a block of 32, with a group that is a multiple of 32
    (`_rounded_product`).

    Without rounding, the order of additions is a kernel's own. The one for CPUs holds x, with 4 bits, as whole numbers
    of 24 bits a block of 32, so that 8 successive columns have an exact sum; a number of x is then off by at most
    2**-24 of the largest in its block, where a product in floats is off by as much of itself (kernels/README.md).
    """
    if bits == 8:
        product = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), codes.astype(jnp.float32))
        return (product * scale).astype(out_dtype)
    assert group is not None
    if activations is None:
        weight = dequantize(codes, scale, *zero, group=group)
        return jnp.einsum("...k,nk->...n", x.astype(jnp.float32), weight).astype(out_dtype)
    return _rounded_product(x, integers(codes, *zero, group=group), scale, group).astype(out_dtype)


def dequantize(codes: jax.Array, scale: jax.Array, *zero: jax.Array, group: int) -> jax.Array:
    """Returns (code - zero) * scale as float32 [..., k], exact: the factors have 5 and 8 bits.

    Args:
      codes: uint8 [..., k / 2].
      scale: bfloat16 [..., k / group].
      zero: uint8 [..., k / group], or nothing: 8.
      group: codes that share a scale and a zero point.
    """
    return integers(codes, *zero, group=group) * jnp.repeat(scale.astype(jnp.float32), group, axis=-1)


def integers(codes: jax.Array, *zero: jax.Array, group: int) -> jax.Array:
    """Returns code - zero as float32 [..., k], of uint8 [..., k / 2]: codes 2 i and 2 i + 1 are the low and the high
    half of byte i."""
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    whole = pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1]).astype(jnp.float32)
    return whole - (jnp.repeat(zero[0].astype(jnp.float32), group, axis=-1) if zero else MIDDLE)


def round_activations(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds x [..., k] to 8 bits a block of 32: float32 integers [..., k / 32, 32] and their step [..., k / 32].

    The largest magnitude becomes 127. Ties go to even.
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    largest = jnp.abs(blocks).max(axis=-1)
    inverse = jnp.where(largest > SMALLEST, 127 / largest, 0)
    return jnp.round(blocks * inverse[..., None]), largest * jnp.float32(1 / 127)


def _rounded_product(x: jax.Array, weight: jax.Array, scale: jax.Array, group: int) -> jax.Array:
    """Sums a block of 32 in integers, and the blocks in a fixed order.

    The integers of a block have a sum below 2**16, exact in float32 however it is computed. Of block g it is
    multiplied by (scale * step) and added to partial sum g mod 16, in ascending g; then partial sums i and i + 8 are
    added, i and i + 4, i and i + 2, 0 and 1.

    weight: float32 [n, k], integers; scale: bfloat16 [n, k / group].
    """
    rounded, step = round_activations(x)  # [..., blocks, 32], [..., blocks]
    n, blocks = weight.shape[0], step.shape[-1]
    scales = jnp.repeat(scale.astype(jnp.float32), group // BLOCK, axis=1)  # [n, blocks]
    terms = (rounded, step[..., None], weight.reshape(n, blocks, BLOCK), scales[..., None])

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        rounded, step, weight, scales = part  # [..., 16, 32], [..., 16, 1], [n, 16, 32], [n, 16, 1]
        sums = jnp.einsum("...gk,ngk->...ng", rounded, weight)
        return total + sums * (scales[..., 0] * step[..., None, :, 0]), None

    total = jnp.zeros((*x.shape[:-1], n, PARTS), jnp.float32)
    total = jax.lax.scan(add, total, tuple(map(_by_parts, terms)))[0]
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def _by_parts(array: jax.Array) -> jax.Array:
    """Returns [..., blocks, c] as [steps, ..., 16, c], zeros added at the end."""
    *outer, blocks, width = array.shape
    steps = math.ceil(blocks / PARTS)
    padded = jnp.pad(array, [*[(0, 0)] * len(outer), (0, steps * PARTS - blocks), (0, 0)])
    return jnp.moveaxis(padded.reshape(*outer, steps, PARTS, width), -3, 0)
