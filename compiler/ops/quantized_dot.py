"""A product with a quantized weight."""

import jax
import jax.numpy as jnp

from xlathe.op import op


@op("quantized_dot")
def quantized_dot(
    x: jax.Array,  # [..., k]
    codes: jax.Array,  # int8 [n, k]
    scale: jax.Array,  # float32 [n]
    *,
    out_dtype: str,
) -> jax.Array:  # [..., n]
    """(x codes^T) * scale, in float32: weight-only quantization, the activations are not rounded."""
    product = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), codes.astype(jnp.float32))
    return (product * scale).astype(out_dtype)
