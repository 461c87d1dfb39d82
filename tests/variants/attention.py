"""Ways to write the attention itself: layouts, contractions, groups of heads, and softmax by hand."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.variants.base import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Params,
    Variant,
    decoder,
    decoder_params,
    merged,
    projected,
    split_heads,
)

SCALE = HEAD_DIM**-0.5


def heads_first(layer: Params, x: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    q, k, v = [
        (x @ layer[w]).reshape(b, t, HEADS, HEAD_DIM).transpose(0, 2, 1, 3) for w in ("wq", "wk", "wv")
    ]
    scores = q @ k.swapaxes(-1, -2) / jnp.sqrt(HEAD_DIM)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), dtype=bool)), scores, -jnp.inf)
    out = jax.nn.softmax(scores, axis=-1) @ v
    return out.transpose(0, 2, 1, 3).reshape(b, t, HEADS * HEAD_DIM) @ layer["wo"]


def tokens_first(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    t = x.shape[1]
    mask = (jnp.arange(t)[:, None] < jnp.arange(t)[None, :]) * -1e9
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k) + mask)
    return merged(layer, jnp.einsum("bhqk,bkhd->bqhd", weights, v))


def repeat_gqa(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    k, v = [jnp.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v)]
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * SCALE
    i = lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    j = lax.broadcasted_iota(jnp.int32, scores.shape, 3)
    weights = jax.nn.softmax(jnp.where(i >= j, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return merged(layer, jnp.einsum("bhts,bshd->bthd", weights, v))


def broadcast_gqa(layer: Params, x: jax.Array) -> jax.Array:
    def repeat_kv(y: jax.Array) -> jax.Array:  # [b, kv, t, d] -> [b, h, t, d]
        b, kv, t, d = y.shape
        return jnp.broadcast_to(y[:, :, None], (b, kv, HEADS // KV_HEADS, t, d)).reshape(b, HEADS, t, d)

    b, t, _ = x.shape
    q, k, v = [jnp.swapaxes(y, 1, 2) for y in projected(layer, x)]
    scores = jnp.matmul(q, repeat_kv(k).transpose(0, 1, 3, 2)) * SCALE
    scores = scores + jnp.triu(jnp.full((t, t), -jnp.inf), k=1)
    out = jnp.matmul(jax.nn.softmax(scores, axis=-1), repeat_kv(v))
    return jnp.swapaxes(out, 1, 2).reshape(b, t, -1) @ layer["wo"]


def grouped_einsum_gqa(layer: Params, x: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    q, k, v = projected(layer, x)
    q = q.reshape(b, t, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * SCALE
    causal = jnp.arange(t)[None, :] <= jnp.arange(t)[:, None]
    scores = jnp.where(causal[None, None, None], scores, -2.3819763e38)
    return merged(layer, jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), v))


def multi_query(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = split_heads(x @ layer["wq"]), x @ layer["wk"], x @ layer["wv"]  # k and v have no axis of heads
    t = x.shape[1]
    scores = jnp.einsum("bnhd,bmd->bhnm", q, k) * SCALE
    scores = jnp.where(jnp.tri(t, dtype=bool), scores, -1e30)
    return merged(layer, jnp.einsum("bhnm,bmd->bnhd", jax.nn.softmax(scores), v))


def vmap_heads(layer: Params, x: jax.Array) -> jax.Array:
    def one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # [t, d] each
        causal = jnp.tril(jnp.ones((q.shape[0], k.shape[0]), bool))
        return jax.nn.softmax(jnp.where(causal, jnp.dot(q, k.T) * SCALE, -jnp.inf)) @ v

    over_heads = jax.vmap(one_head, in_axes=1, out_axes=1)
    return merged(layer, jax.vmap(over_heads)(*projected(layer, x)))


def flattened_heads(layer: Params, x: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    q, k, v = [y.transpose(0, 2, 1, 3).reshape(b * HEADS, t, HEAD_DIM) for y in projected(layer, x)]
    scores = lax.dot_general(q * SCALE, k, (((2,), (2,)), ((0,), (0,))))
    scores = lax.select(
        jnp.broadcast_to(jnp.tri(t, dtype=bool), scores.shape), scores, jnp.full_like(scores, -1e9)
    )
    out = lax.batch_matmul(jax.nn.softmax(scores), v)
    return merged(layer, out.reshape(b, HEADS, t, HEAD_DIM).transpose(0, 2, 1, 3))


def fused_qkv(layer: Params, x: jax.Array) -> jax.Array:
    b, t, c = x.shape
    q, k, v = jnp.split(x @ layer["wqkv"], 3, axis=-1)
    q, k, v = [y.reshape(b, t, HEADS, c // HEADS).transpose(0, 2, 1, 3) for y in (q, k, v)]
    att = (q @ k.transpose(0, 1, 3, 2)) * (1.0 / jnp.sqrt(k.shape[-1]))
    att = jnp.where(jnp.tril(jnp.ones((t, t))) == 0, float("-inf"), att)
    y = jax.nn.softmax(att, axis=-1) @ v
    return y.transpose(0, 2, 1, 3).reshape(b, t, c) @ layer["wo"]


def fused_qkv_params() -> Params:
    params = decoder_params(8)
    for layer in params["layers"]:
        layer["wqkv"] = jnp.concatenate([layer.pop(w) for w in ("wq", "wk", "wv")], axis=1)
    return params


DECODERS = (
    Variant("heads_first", lambda: (decoder(heads_first), decoder_params(0))),
    Variant("tokens_first", lambda: (decoder(tokens_first), decoder_params(1))),
    Variant("repeat_gqa", lambda: (decoder(repeat_gqa), decoder_params(2, KV_HEADS))),
    Variant("broadcast_gqa", lambda: (decoder(broadcast_gqa), decoder_params(3, KV_HEADS))),
    Variant("grouped_einsum_gqa", lambda: (decoder(grouped_einsum_gqa), decoder_params(4, KV_HEADS))),
    Variant("multi_query", lambda: (decoder(multi_query), decoder_params(5, 1))),
    Variant("vmap_heads", lambda: (decoder(vmap_heads), decoder_params(6))),
    Variant("flattened_heads", lambda: (decoder(flattened_heads), decoder_params(7))),
    Variant("fused_qkv", lambda: (decoder(fused_qkv), fused_qkv_params())),
)
