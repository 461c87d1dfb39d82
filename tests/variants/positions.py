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


ANGLES = np.outer(np.arange(MAX_LEN), 1e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)  # [max_len, d / 2]


def rope_table_sliced(layer: Params, x: jax.Array) -> jax.Array:
    cos, sin = [jnp.asarray(table)[: x.shape[1], None, :] for table in (COS, SIN)]

    def rotate(y: jax.Array) -> jax.Array:
        y1, y2 = jnp.split(y, 2, axis=-1)
        return jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos], axis=-1)

    q, k, v = projected(layer, x)
    return merged(layer, causal_attention(rotate(q), rotate(k), v))


def rope_table_gathered(layer: Params, x: jax.Array) -> jax.Array:
    def rotate(y: jax.Array, position_ids: jax.Array) -> jax.Array:  # y [b, h, t, d], position_ids [b, t]
        cos = jnp.tile(jnp.asarray(COS)[position_ids], 2)[:, None]
        sin = jnp.tile(jnp.asarray(SIN)[position_ids], 2)[:, None]
        y1, y2 = y[..., : HEAD_DIM // 2], y[..., HEAD_DIM // 2 :]
        return y * cos + jnp.concatenate((-y2, y1), axis=-1) * sin

    b, t, _ = x.shape
    position_ids = jnp.broadcast_to(jnp.arange(t)[None, :], (b, t))
    q, k, v = [y.transpose(0, 2, 1, 3) for y in projected(layer, x)]
    q, k = rotate(q, position_ids), rotate(k, position_ids)
    return merged(layer, causal_attention(*[y.transpose(0, 2, 1, 3) for y in (q, k, v)]))


def rope_complex(layer: Params, x: jax.Array) -> jax.Array:
    turns = jnp.exp(1j * jnp.asarray(ANGLES))[: x.shape[1], None, :]  # complex64

    def rotate(y: jax.Array) -> jax.Array:
        pairs = y.reshape(*y.shape[:-1], -1, 2)
        turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * turns
        return jnp.stack([turned.real, turned.imag], axis=-1).reshape(y.shape)

    q, k, v = projected(layer, x)
    return merged(layer, causal_attention(rotate(q), rotate(k), v))


ALIBI_SLOPES = np.exp2(-2.0 * np.arange(1, HEADS + 1, dtype=np.float32))  # [h]


def alibi_keys(layer: Params, x: jax.Array) -> jax.Array:
    bias = ALIBI_SLOPES[:, None, None] * jnp.arange(
        x.shape[1]
    )  # [h, 1, t]: grows with the key, not the distance
    return merged(layer, causal_attention(*projected(layer, x), bias))


def alibi_from_the_end(layer: Params, x: jax.Array) -> jax.Array:
    bias = ALIBI_SLOPES[:, None, None] * jnp.arange(
        1 - x.shape[1], 1
    )  # zero at the last key, negative before
    return merged(layer, causal_attention(*projected(layer, x), bias))


def alibi_distance(layer: Params, x: jax.Array) -> jax.Array:
    positions = jnp.arange(x.shape[1])
    distance = jnp.abs(positions[:, None] - positions[None, :]).astype(x.dtype)
    bias = -jnp.einsum("h,qk->hqk", ALIBI_SLOPES, distance)
    return merged(layer, causal_attention(*projected(layer, x), bias))


BUCKETS, FARTHEST = 8, 32


def relative_buckets(t: int) -> jax.Array:
    """[t, t]: half of the buckets for exact distances, half for logarithmically wider ones up to FARTHEST."""
    distance = jnp.maximum(jnp.arange(t)[:, None] - jnp.arange(t)[None, :], 0)
    exact = BUCKETS // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / np.log(FARTHEST / exact)
    wide = exact + (ratio * (BUCKETS - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(wide, BUCKETS - 1))


def relative_bias(params: Params, tokens: jax.Array) -> jax.Array:
    """One learned table [buckets, h], its bias shared by all layers."""
    bias = params["relative"][relative_buckets(tokens.shape[1])].transpose(2, 0, 1)[None]  # [1, h, t, t]
    return decoder(lambda layer, x: merged(layer, causal_attention(*projected(layer, x), bias)))(
        params, tokens
    )


def log_n_scaled(layer: Params, x: jax.Array) -> jax.Array:
    """Each query is sharpened by the number of tokens that it sees."""
    q, k, v = projected(layer, x)
    seen = jnp.arange(x.shape[1], dtype=x.dtype) + 1
    return merged(layer, causal_attention(q * jnp.log(seen)[None, :, None, None], k, v))


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


def learned_with_offset(params: Params, tokens: jax.Array) -> jax.Array:
    """The first two rows of the table are never used."""
    positions = jax.lax.iota(jnp.int32, tokens.shape[1])[None] + 2
    return blocks(params, params["embed"][tokens] + jnp.take(params["wpe"], positions, axis=0))


def sinusoidal(params: Params, tokens: jax.Array) -> jax.Array:
    rate = jnp.exp(jnp.arange(0, WIDTH, 2) * (-np.log(10000.0) / WIDTH))
    angles = jnp.arange(tokens.shape[1])[:, None] * rate[None, :]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return blocks(params, params["embed"][tokens] + waves)


def with_table(seed: int, name: str, *shape: int) -> Params:
    return decoder_params(seed) | {name: normal(np.random.default_rng(seed + 1000), *shape, std=1.0)}


DECODERS = (
    Variant("rope_half", lambda: (decoder(rope_half), decoder_params(40))),
    Variant("rope_interleaved", lambda: (decoder(rope_interleaved), decoder_params(41))),
    Variant(
        "rope_table_sliced",
        lambda: (decoder(rope_table_sliced), decoder_params(40)),
        twin=lambda: (decoder(rope_half), decoder_params(40)),
    ),
    Variant(
        "rope_table_gathered",
        lambda: (decoder(rope_table_gathered), decoder_params(40)),
        twin=lambda: (decoder(rope_half), decoder_params(40)),
    ),
    Variant("rope_complex", lambda: (decoder(rope_complex), decoder_params(42))),
    Variant("alibi_keys", lambda: (decoder(alibi_keys), decoder_params(43))),
    Variant(
        "alibi_from_the_end",
        lambda: (decoder(alibi_from_the_end), decoder_params(43)),
        twin=lambda: (decoder(alibi_distance), decoder_params(43)),
    ),
    Variant(
        "alibi_distance",
        lambda: (decoder(alibi_distance), decoder_params(43)),
        twin=lambda: (decoder(alibi_keys), decoder_params(43)),
    ),
    Variant("relative_bias", lambda: (relative_bias, with_table(44, "relative", BUCKETS, HEADS))),
    Variant("log_n_scaled", lambda: (decoder(log_n_scaled), decoder_params(45))),
    Variant("learned_positions_gathered", lambda: (learned_gathered, with_table(46, "wpe", MAX_LEN, WIDTH))),
    Variant("learned_positions_sliced", lambda: (learned_sliced, with_table(47, "wpe", MAX_LEN, WIDTH))),
    Variant(
        "learned_positions_offset", lambda: (learned_with_offset, with_table(48, "wpe", MAX_LEN + 2, WIDTH))
    ),
    Variant("sinusoidal_positions", lambda: (sinusoidal, decoder_params(49))),
)
