"""A product with a quantized weight."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xlathe.op import op
from xlathe.ops.activations import BLOCK, round_blocks, round_tokens
from xlathe.storage import Blocks, Format, Scaled, all_lines, parse_format, shares

PARTS = 16
"""Partial sums of a product with activations rounded in blocks."""
LINES = 128
"""Rows of a weight are expanded by multiples of so many, a part of it at a time,"""
EXPANDED = 1 << 20
"""each of about so many numbers."""


@op("quantized_dot")
def quantized_dot(
    x: jax.Array,  # [..., k]
    *parts: jax.Array,  # what `format` says of a weight [n, k]; then, if activations are static, their step float32 []
    out_dtype: str,
    format: str,
    activations: str | None = None,
) -> jax.Array:  # [..., n]
    """x w^T in float32, where w is what the parts stand for.

    format: text of a storage format (`xlathe.storage`). activations: None, not rounded; or one of `ACTIVATIONS`,
    rounded before they are multiplied: `int8` a block of 32, with integers in groups of a multiple of 32
    (`_rounded_product`), and with GGUF's blocks as many as a block of the weight, as llama.cpp does. Scales of
    `int8:channel` and `int8:tensor` multiply sums, which are exact where activations are rounded to int8.

    Otherwise the order of additions is a kernel's own. The one for CPUs holds x, with 4 bits, as whole numbers
    of 24 bits a block of 32, so that 8 successive columns have an exact sum; a number of x is then off by at most
    2**-24 of the largest in its block, where a product in floats is off by as much of itself (kernels/README.md). So it
    does with GGUF's blocks, 4 columns at a time. What overflows, or meets what is not finite, is not finite anywhere;
    whether it is NaN or infinite is a kernel's own.
    """
    stored = parse_format(format)
    if activations == "int8" and isinstance(stored, Blocks):
        levels, step = round_blocks(x, stored.layout.numbers)
        rounded = (levels * step[..., None]).reshape(x.shape)
        return _stored_product(rounded, stored, parts).astype(out_dtype)
    if activations == "int8":
        assert isinstance(stored, Scaled)
        return _rounded_product(x, *stored.grouped(*parts), stored.columns).astype(out_dtype)
    if activations is None:
        rounded, steps = x.astype(jnp.float32), jnp.float32(1)
    else:
        *weight, last = parts
        static = activations.endswith("_static")
        rounded, steps = round_tokens(x, activations, *[last] * static)
        parts = tuple(weight) if static else parts
    if not is_whole(stored):
        return (_stored_product(rounded, stored, parts) * steps).astype(out_dtype)
    codes, scale = parts
    if activations is not None and activations.startswith("int8"):
        whole = jnp.einsum("...k,nk->...n", rounded.astype(jnp.int8), codes, preferred_element_type=jnp.int32)
        sums = whole.astype(jnp.float32)
    else:
        sums = _product(rounded, lambda lines: lines.astype(jnp.float32), [codes])
    return (sums * (steps * scale)).astype(out_dtype)


def is_whole(stored: Format) -> bool:
    """Says whether a weight is int8 with scales that a sum over k need not know."""
    return isinstance(stored, Scaled) and (stored.element, stored.columns, stored.zero) == ("int8", 0, "")


def _stored_product(x: jax.Array, stored: Format, parts: Sequence[jax.Array]) -> jax.Array:
    return _product(x, stored.decode, all_lines(stored, *parts), [bool(rows) for rows in shares(stored)])


def _product(
    x: jax.Array, decode: Callable[..., jax.Array], lines: Sequence[jax.Array], of_rows: Sequence[bool] = (True,)
) -> jax.Array:
    """Returns x w^T; the float32 weight is made of a line of each part, some rows at a time.

    of_rows: whether an array has a line for each row; what has not belongs to the whole tensor.
    """
    n, k = lines[0].shape[0], x.shape[-1]
    height = max(EXPANDED // k // LINES, 1) * LINES
    whole = n // height if n >= 2 * height else 0

    def expanded(rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
        some = (rows(line) if own else line for line, own in zip(lines, of_rows, strict=True))
        return jnp.einsum("...k,nk->...n", x, decode(*some))

    def block(_: None, i: jax.Array) -> tuple[None, jax.Array]:
        return None, expanded(lambda line: jax.lax.dynamic_slice_in_dim(line, i * height, height))

    if not whole:
        return expanded(lambda line: line)
    blocks = jax.lax.scan(block, None, jnp.arange(whole))[1]  # [whole, ..., height]
    first = jnp.moveaxis(blocks, 0, -2).reshape(*x.shape[:-1], whole * height)
    if n == whole * height:
        return first
    return jnp.concatenate([first, expanded(lambda line: line[whole * height :])], axis=-1)


def _rounded_product(x: jax.Array, weight: jax.Array, scale: jax.Array, group: int) -> jax.Array:
    """Sums a block of 32 in integers, and the blocks in a fixed order.

    The integers of a block have a sum below 2**24, exact in float32 however it is computed. Of block g it is
    multiplied by (scale * step) and added to partial sum g mod 16, in ascending g; then partial sums i and i + 8 are
    added, i and i + 4, i and i + 2, 0 and 1.

    weight: float32 [n, k], integers; scale: float32 [n, k / group].
    """
    rounded, step = round_blocks(x)  # [..., blocks, 32], [..., blocks]
    n, blocks = weight.shape[0], step.shape[-1]
    scales = jnp.repeat(scale, group // BLOCK, axis=1)  # [n, blocks]
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
