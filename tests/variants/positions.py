"""Ways to tell positions apart: rotations, biases and learned tables."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.variants.base import (
    HEAD_DIM,
    HEADS,
    MAX_LEN,
    WIDTH,
    Params,
    Variant,
    decoder,
    decoder_params,
    merged,
    mlp,
    normal,
    projected,
    rms_norm,
)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    """q, k and v [b, t, h, d]; bias broadcasts to [b, h, t, t]."""
    t = q.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5 + bias
    scores = jnp.where(jnp.arange(t)[:, None] >= jnp.arange(t), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def rope_half(layer: Params, x: jax.Array) -> jax.Array:
    def rotate(y: jax.Array) -> jax.Array:
        inverse = 1.0 / (10000.0 ** (jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        angle = jnp.einsum("t,f->tf", jnp.arange(y.shape[1], dtype=jnp.float32), inverse)
        cos, sin = [jnp.concatenate([f(angle)] * 2, axis=-1)[None, :, None, :] for f in (jnp.cos, jnp.sin)]
        first, second = jnp.split(y, 2, axis=-1)
        return y * cos + jnp.concatenate([-second, first], axis=-1) * sin

    q, k, v = projected(layer, x)
    return merged(layer, causal_attention(rotate(q), rotate(k), v))


def rope_interleaved(layer: Params, x: jax.Array) -> jax.Array:
    def rotate(y: jax.Array) -> jax.Array:
        b, t, h, d = y.shape
        theta = 500.0 ** (-2.0 * jnp.arange(d // 2) / d)
        angle = jnp.arange(t)[:, None] * theta
        even, odd = y[..., ::2], y[..., 1::2]
        cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(b, t, h, d)

    q, k, v = projected(layer, x)
    return merged(layer, causal_attention(rotate(q), rotate(k), v))


ALIBI_SLOPES = np.exp2(-2.0 * np.arange(1, HEADS + 1, dtype=np.float32))  # [h]


def alibi_keys(layer: Params, x: jax.Array) -> jax.Array:
    bias = ALIBI_SLOPES[:, None, None] * jnp.arange(x.shape[1])  # [h, 1, t]: grows with the key, not the distance
    return merged(layer, causal_attention(*projected(layer, x), bias))


def alibi_from_the_end(layer: Params, x: jax.Array) -> jax.Array:
    bias = ALIBI_SLOPES[:, None, None] * jnp.arange(1 - x.shape[1], 1)  # zero at the last key, negative before
    return merged(layer, causal_attention(*projected(layer, x), bias))


def plain(layer: Params, x: jax.Array) -> jax.Array:
    return merged(layer, causal_attention(*projected(layer, x)))


def blocks(params: Params, x: jax.Array) -> jax.Array:
    for layer in params["layers"]:
        x = x + plain(layer, rms_norm(x, layer["norm1"]))
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def learned_gathered(params: Params, tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])
    return blocks(params, params["embed"][tokens] + params["wpe"][positions])


def learned_sliced(params: Params, tokens: jax.Array) -> jax.Array:
    return blocks(params, params["embed"][tokens] + params["wpe"][None, : tokens.shape[1]])


def with_position_table(seed: int) -> Params:
    return decoder_params(seed) | {"wpe": normal(np.random.default_rng(seed + 1000), MAX_LEN, WIDTH, std=1.0)}


DECODERS = (
    Variant("rope_half", lambda: (decoder(rope_half), decoder_params(40))),
    Variant("rope_interleaved", lambda: (decoder(rope_interleaved), decoder_params(41))),
    Variant("alibi_keys", lambda: (decoder(alibi_keys), decoder_params(43))),
    Variant("alibi_from_the_end", lambda: (decoder(alibi_from_the_end), decoder_params(44))),
    Variant("learned_positions_gathered", lambda: (learned_gathered, with_position_table(45))),
    Variant("learned_positions_sliced", lambda: (learned_sliced, with_position_table(46))),
)
