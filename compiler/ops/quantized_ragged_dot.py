"""Products of groups of rows with a quantized weight each: the experts of a mixture."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlathe.op import op
from xlathe.ops.quantized_dot import quantized_dot


@op("quantized_ragged_dot")
def quantized_ragged_dot(
    x: jax.Array,  # [m, k], the rows of the first expert, of the second, ...
    sizes: jax.Array,  # int32 [experts]: how many rows each has; they sum to at most m
    *parts: jax.Array,  # [experts, ...]; as `quantized_dot` takes them, for each expert
    out_dtype: str,
    **scheme: Any,
) -> jax.Array:  # [m, n]
    """`quantized_dot` of each row with the weight of its expert; rows after the last expert's give zeros.

    An expert without rows is not read by a kernel, whatever its weight holds. This body computes all experts, one
    after the other.
    """
    # one equation each, also where the number of rows is symbolic: bodies are compared
    ends, places = lax.cumsum(sizes), lax.iota(sizes.dtype, x.shape[0])

    def add(total: jax.Array, expert: Any) -> tuple[jax.Array, None]:
        end, size, *own_parts = expert
        product = quantized_dot.body(x, *own_parts, out_dtype=out_dtype, **scheme)
        own = lax.broadcast_in_dim((places < end) & (places >= end - size), total.shape, (0,))
        return lax.select(own, product, total), None

    total = jnp.zeros((x.shape[0], parts[0].shape[1]), out_dtype)
    return lax.scan(add, total, (ends, sizes, *parts))[0]
