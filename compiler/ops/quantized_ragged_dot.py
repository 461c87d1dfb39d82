"""Products of groups of rows with a quantized weight each: the experts of a mixture."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlathe.op import op
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.storage import as_bytes


@op("quantized_ragged_dot")
def quantized_ragged_dot(
    x: jax.Array,  # [m, k], the rows of the first expert, of the second, ...
    sizes: jax.Array,  # int32 [experts]: how many rows each has; they sum to at most m
    *parts: jax.Array,  # [experts, ...]; as `quantized_dot` takes them, for each expert
    out_dtype: str,
    **scheme: Any,
) -> jax.Array:  # [m, n]
    """`quantized_dot` of each row with the weight of its expert; rows after the last expert's give zeros.

    An expert without rows is not read, whatever its weight holds.
    """
    width, raw = parts[0].shape[1], [as_bytes(part) for part in parts]

    def product(i: jax.Array) -> jax.Array:
        own = (lax.dynamic_index_in_dim(part, i, keepdims=False) for part in raw)
        return quantized_dot.body(x, *own, out_dtype=out_dtype, **scheme)

    return by_expert(product, sizes, jnp.zeros((x.shape[0], width), out_dtype))


def by_expert(product: Callable[[jax.Array], jax.Array], sizes: jax.Array, total: jax.Array) -> jax.Array:
    """Returns `total` with the rows of each expert taken from `product` of its number, which is asked of those alone
    that have rows."""
    # one equation each, also where the number of rows is symbolic: bodies are compared
    ends, places = lax.cumsum(sizes), lax.iota(sizes.dtype, total.shape[0])

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        end, size = (lax.dynamic_index_in_dim(array, i, keepdims=False) for array in (ends, sizes))

        def with_own(total: jax.Array) -> jax.Array:
            own = lax.broadcast_in_dim((places < end) & (places >= end - size), total.shape, (0,))
            return lax.select(own, product(i), total)

        return lax.cond(size > 0, with_own, lambda total: total, total)

    return lax.fori_loop(0, sizes.shape[0], add, total)
