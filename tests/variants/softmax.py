"""Ways to write the softmax of attention: by hand, in log space, divided late, capped, or with a sink."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.variants.base import (
    HEAD_DIM,
    HEADS,
    Params,
    Variant,
    decoder,
    decoder_params,
    merged,
    normal,
    projected,
    rms_norm,
    split_heads,
)


def by_hand(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(HEAD_DIM)
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e10)
    scores = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def divided_late(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = [y.swapaxes(1, 2) for y in projected(layer, x)]  # [b, h, t, d]
    logits = q @ k.mT * HEAD_DIM**-0.5
    logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
    unnormalized = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    out = (unnormalized @ v) / unnormalized.sum(axis=-1)[..., None]
    return merged(layer, out.swapaxes(1, 2))


def log_space(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    scores += jnp.where(jnp.tri(x.shape[1], dtype=bool), 0.0, -1e9)
    weights = jnp.exp(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def masked_by_where_argument(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    positions = jnp.arange(x.shape[1])
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    weights = jax.nn.softmax(scores, axis=-1, where=positions[:, None] >= positions[None, :])
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def masked_by_product(layer: Params, x: jax.Array) -> jax.Array:
    """The mask multiplies the exponentials before they are summed, so it is a sound softmax."""
    q, k, v = projected(layer, x)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights *= jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def keys_first(layer: Params, x: jax.Array) -> jax.Array:
    """Scores are [b, key, query, h], so axis 1 is the right one for the softmax."""
    q, k, v = projected(layer, x)
    positions = jnp.arange(x.shape[1])
    scores = jnp.einsum("bkhd,bqhd->bkqh", k, q) / np.sqrt(HEAD_DIM)
    scores = jnp.where((positions[:, None] <= positions)[None, :, :, None], scores, -jnp.inf)
    return merged(layer, jnp.einsum("bkqh,bkhd->bqhd", jax.nn.softmax(scores, axis=1), v))


def float32_softmax(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)  # bfloat16
    t = x.shape[1]
    scores = jnp.einsum("bihd,bjhd->bhij", q, k, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    return jnp.tanh(x / cap) * cap


def soft_capped(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    t = x.shape[1]
    logits = soft_cap(jnp.einsum("BTNH,BSNH->BNTS", q * HEAD_DIM**-0.5, k), 4.0)
    logits = jnp.where(jnp.tril(jnp.ones((1, 1, t, t), bool)), logits, -2.3819763e38)
    return merged(layer, jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits, axis=-1), v))


def soft_capped_decoder(params: Params, tokens: jax.Array) -> jax.Array:
    return soft_cap(decoder(soft_capped)(params, tokens), 2.0)


def query_key_norm(layer: Params, x: jax.Array) -> jax.Array:
    q = rms_norm(split_heads(x @ layer["wq"]), layer["q_norm"])
    k = rms_norm(split_heads(x @ layer["wk"]), layer["k_norm"])
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), split_heads(x @ layer["wv"])))


def sink_column(layer: Params, x: jax.Array) -> jax.Array:
    """A learned logit a head takes part in the softmax and is then dropped (gpt-oss)."""
    q, k, v = projected(layer, x)
    b, t, h, _ = q.shape
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    scores = jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf)
    sink = jnp.broadcast_to(layer["sink"][None, :, None, None], (b, h, t, 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]  # refused
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def sink_denominator(layer: Params, x: jax.Array) -> jax.Array:
    """The same sink as one more term of the denominator."""
    q, k, v = projected(layer, x)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5  # refused
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
    sink = layer["sink"][:, None, None]
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = jnp.exp(scores - top)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
    return merged(layer, jnp.einsum("bhij,bjhd->bihd", weights, v))


def bfloat16_params(seed: int) -> Params:
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16), decoder_params(seed))


def with_sinks(seed: int) -> Params:
    params, rng = decoder_params(seed), np.random.default_rng(seed + 1000)
    for layer in params["layers"]:
        layer["sink"] = 2.0 + normal(rng, HEADS, std=1.0)
    return params


def with_query_key_norm(seed: int) -> Params:
    params, rng = decoder_params(seed), np.random.default_rng(seed + 1000)
    for layer in params["layers"]:
        layer |= {
            "q_norm": 1.6 + normal(rng, HEAD_DIM, std=0.2),
            "k_norm": 1.6 + normal(rng, HEAD_DIM, std=0.2),
        }
    return params


DECODERS = (
    Variant("softmax_by_hand", lambda: (decoder(by_hand), decoder_params(20))),
    Variant("softmax_divided_late", lambda: (decoder(divided_late), decoder_params(21))),
    Variant("softmax_log_space", lambda: (decoder(log_space), decoder_params(22))),
    Variant("softmax_where_argument", lambda: (decoder(masked_by_where_argument), decoder_params(23))),
    Variant("softmax_masked_by_product", lambda: (decoder(masked_by_product), decoder_params(24))),
    Variant("softmax_keys_first", lambda: (decoder(keys_first), decoder_params(25))),
    Variant("bfloat16_float32_softmax", lambda: (decoder(float32_softmax), bfloat16_params(26)), rtol=2e-2),
    Variant("soft_cap", lambda: (soft_capped_decoder, decoder_params(27)), notes="scores and final logits"),
    Variant("query_key_norm", lambda: (decoder(query_key_norm), with_query_key_norm(28))),
)

REFUSED = (  # sound, but the operation `attention` has no sink
    Variant(
        "sink_column",
        lambda: (decoder(sink_column), with_sinks(29)),
        layers=0,
        reason="concatenate between the product and the softmax",
        author=sink_column,
    ),
    Variant(
        "sink_denominator",
        lambda: (decoder(sink_denominator), with_sinks(29)),
        layers=0,
        twin=lambda: (decoder(sink_column), with_sinks(29)),
        reason="multiplies every token with every other token",
        author=sink_denominator,
    ),
)
