"""Authorings met in packages that others wrote for Flax, in their smallest form."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.variants.attention import heads_first
from tests.variants.base import HEAD_DIM, Params, Variant, decoder, decoder_params, merged, projected
from tests.variants.masks import masked_attention, window_difference
from tests.variants.positions import ALIBI_SLOPES, alibi_distance, causal_attention, rope_interleaved


def alibi_kept_axes(layer: Params, x: jax.Array) -> jax.Array:
    """attnax: a bias [1, h, t, t] meets scores [b, h, t, t], and JAX repeats axes of size 1 without saying so."""
    q, k, v = [y.transpose(0, 2, 1, 3) for y in projected(layer, x)]
    i, j = jnp.arange(x.shape[1])[None, None, :, None], jnp.arange(x.shape[1])[None, None, None, :]
    scores = q @ k.mT / np.sqrt(HEAD_DIM)
    scores = scores - ALIBI_SLOPES[None, :, None, None] * jnp.abs(i.astype(x.dtype) - j.astype(x.dtype))
    scores = jnp.where(i >= j, scores, jnp.finfo(scores.dtype).min)
    return merged(layer, (jax.nn.softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3))


def window_behind_a_branch(layer: Params, x: jax.Array) -> jax.Array:
    """gemma: the positions of keys depend on whether a cache has gone round, which it has not."""
    keys = jax.lax.cond(
        x.shape[1] <= x.shape[1], lambda: jnp.arange(x.shape[1]), lambda: jnp.arange(x.shape[1])[::-1]
    )
    distance = jnp.arange(x.shape[1])[:, None] - keys[None, :]
    return masked_attention(layer, x, (distance >= 0) & (distance < 7))


def rope_written(layer: Params, x: jax.Array) -> jax.Array:
    """dantinox: the turned features are written into an empty array, every second one at a time."""

    def rotate(y: jax.Array) -> jax.Array:
        theta = 500.0 ** (-2.0 * jnp.arange(HEAD_DIM // 2) / HEAD_DIM)
        angle = (jnp.arange(y.shape[1])[:, None] * theta)[:, None, :]
        even, odd, turned = y[..., ::2], y[..., 1::2], jnp.empty_like(y)
        turned = turned.at[..., ::2].set(even * jnp.cos(angle) - odd * jnp.sin(angle))
        return turned.at[..., 1::2].set(even * jnp.sin(angle) + odd * jnp.cos(angle))

    q, k, v = projected(layer, x)
    return merged(layer, causal_attention(rotate(q), rotate(k), v))


def placed(layer: Params, x: jax.Array) -> jax.Array:
    """Where activations lie on the devices that the author trained on."""
    devices = jax.sharding.Mesh(np.asarray(jax.local_devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(heads_first(layer, x), sharding)


DECODERS = (
    Variant(
        "alibi_kept_axes",
        lambda: (decoder(alibi_kept_axes), decoder_params(43)),
        twin=lambda: (decoder(alibi_distance), decoder_params(43)),
    ),
    Variant(
        "window_behind_a_branch",
        lambda: (decoder(window_behind_a_branch), decoder_params(60)),
        window=7,
        twin=lambda: (decoder(window_difference), decoder_params(60)),
    ),
    Variant(
        "rope_written",
        lambda: (decoder(rope_written), decoder_params(41)),
        twin=lambda: (decoder(rope_interleaved), decoder_params(41)),
    ),
    Variant(
        "sharding_constraint",
        lambda: (decoder(placed), decoder_params(130)),
        twin=lambda: (decoder(heads_first), decoder_params(130)),
    ),
)
