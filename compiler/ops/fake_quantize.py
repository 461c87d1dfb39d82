"""Rounding that gradients pass: what weights and activations will be once they are quantized, in floats.

Gradients are those of the identity (the straight-through estimator of Bengio, Leonard and Courville 2013,
arXiv 1308.3432), at the rounded value. What is not finite becomes NaN.
"""

import jax

from xlathe.op import op
from xlathe.ops.activations import round_blocks, round_tokens
from xlathe.storage import Scaled, parse_format
from xlathe.storage.cast import Cast


@op("fake_quantize")
def fake_quantize(weight: jax.Array, *, format: str) -> jax.Array:
    """Returns float32 [n, k] as a storage format rounds it to nearest: what `dequantize(*encode(weight))` is.

    format: text of a `Scaled` or `Cast` one (`xlathe.storage`).
    """
    stored = parse_format(format)
    if isinstance(stored, Scaled):
        scale, zero = stored.spread(stored.fit(weight), weight.shape)
        return _straight_through(weight, stored.values(stored.nearest(weight, scale, zero), scale, zero))
    assert isinstance(stored, Cast)
    return _straight_through(weight, stored.decode(*stored.encode(weight)))


@op("fake_round")
def fake_round(x: jax.Array, *, activations: str) -> jax.Array:
    """Returns float32 [..., k] as `activations`, one of `ACTIVATIONS` that is not static, rounds x."""
    levels, step = round_blocks(x) if activations == "int8" else round_tokens(x, activations)
    rounded = levels * (step[..., None] if activations == "int8" else step)
    return _straight_through(x.astype(rounded.dtype), rounded.reshape(x.shape))


def _straight_through(value: jax.Array, rounded: jax.Array) -> jax.Array:
    """Returns `rounded` to the bit, with the gradient of `value`; NaN where that is not finite, as its difference."""
    return jax.lax.stop_gradient(rounded) + (value - jax.lax.stop_gradient(value))
