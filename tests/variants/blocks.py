"""Ways to arrange a decoder around its attention: residuals, feed-forwards, embeddings, shared caches."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tests.variants.base import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    Attend,
    Params,
    Variant,
    decoder,
    decoder_params,
    merged,
    mlp,
    normal,
    projected,
    rms_norm,
    split_heads,
)

EXPERTS = 4


def causal(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    return merged(layer, attention(q, k, v))


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, axis=-1), v)


def parallel(params: Params, tokens: jax.Array) -> jax.Array:
    """Attention and feed-forward read the same normalized input."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        h = rms_norm(x, layer["norm1"])
        x = x + causal(layer, h) + mlp(layer, h)
    return rms_norm(x, params["norm"]) @ params["unembed"]


def post_norm(params: Params, tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = rms_norm(x + causal(layer, x), layer["norm1"])
        x = rms_norm(x + mlp(layer, x), layer["norm2"])
    return x @ params["unembed"]


def tied_head(params: Params, tokens: jax.Array) -> jax.Array:
    x = jnp.take(params["embed"], tokens, axis=0) * WIDTH**-0.5
    for layer in params["layers"]:
        x = x + causal(layer, rms_norm(x, layer["norm1"]))
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return jnp.einsum("btd,vd->btv", rms_norm(x, params["norm"]), params["embed"]) * WIDTH**-0.5


def one_hot_embedding(params: Params, tokens: jax.Array) -> jax.Array:
    x = jax.nn.one_hot(tokens, VOCAB) @ params["embed"]
    for layer in params["layers"]:
        x = x + causal(layer, rms_norm(x, layer["norm1"]))
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def tokens_before_batch(params: Params, tokens: jax.Array) -> jax.Array:
    """Activations are [t, b, d] throughout."""
    x = params["embed"][tokens.T]
    t, b, _ = x.shape
    future = jnp.triu(jnp.full((t, t), -1e9), k=1)
    for layer in params["layers"]:
        h = rms_norm(x, layer["norm1"])
        q, k, v = [(h @ layer[w]).reshape(t, b * HEADS, HEAD_DIM).swapaxes(0, 1) for w in ("wq", "wk", "wv")]
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / math.sqrt(HEAD_DIM) + future, axis=-1)
        x = x + (weights @ v).swapaxes(0, 1).reshape(t, b, WIDTH) @ layer["wo"]
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return (rms_norm(x, params["norm"]) @ params["unembed"]).transpose(1, 0, 2)


def head_by_head(layer: Params, x: jax.Array) -> jax.Array:
    """A Python loop over heads: each is an attention of its own."""

    def head(i: int) -> jax.Array:
        q, k, v = [x @ layer[w][:, i * HEAD_DIM : (i + 1) * HEAD_DIM] for w in ("wq", "wk", "wv")]
        weights = q @ k.transpose(0, 2, 1) * HEAD_DIM**-0.5
        weights = jnp.where(jnp.tril(jnp.ones((x.shape[1], x.shape[1]))) == 0, -jnp.inf, weights)
        return jax.nn.softmax(weights, axis=-1) @ v

    return jnp.concatenate([head(i) for i in range(HEADS)], axis=-1) @ layer["wo"]


def routed(params: Params, tokens: jax.Array, gates: Attend) -> jax.Array:
    """Every expert runs on every token; `gates` (layer, x) -> [b, t, experts] weighs them."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = x + causal(layer, rms_norm(x, layer["norm1"]))
        h = rms_norm(x, layer["norm2"])
        outputs = jnp.einsum(
            "btef,efd->bted", jax.nn.silu(jnp.einsum("btd,edf->btef", h, layer["ups"])), layer["downs"]
        )
        x = x + jnp.einsum("bted,bte->btd", outputs, gates(layer, h))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def top_two(layer: Params, x: jax.Array) -> jax.Array:
    values, experts = jax.lax.top_k(x @ layer["router"], 2)
    return jnp.einsum("btk,btke->bte", jax.nn.softmax(values, axis=-1), jax.nn.one_hot(experts, EXPERTS))


def top_two_by_threshold(layer: Params, x: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(x @ layer["router"])
    kept = jnp.where(probabilities >= jnp.sort(probabilities, axis=-1)[..., -2:-1], probabilities, 0.0)
    return kept / kept.sum(axis=-1, keepdims=True)


def looked_up(params: Params, tokens: jax.Array) -> jax.Array:
    """All experts compute; each token looks up what its two made, by indices that count rows and tokens."""
    (b, t), x = tokens.shape, params["embed"][tokens]
    for layer in params["layers"]:
        x = x + causal(layer, rms_norm(x, layer["norm1"]))
        y = rms_norm(x, layer["norm2"])
        made = jnp.stack([jax.nn.silu(y @ u) @ d for u, d in zip(layer["ups"], layer["downs"], strict=True)])
        gates, chosen = jax.lax.top_k(jax.nn.softmax(y @ layer["router"]), 2)
        own = made[chosen, jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None]]
        x = x + jnp.sum((gates / gates.sum(-1, keepdims=True))[..., None] * own, axis=2)
    return rms_norm(x, params["norm"]) @ params["unembed"]


def no_attention(params: Params, tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def shared_cache(params: Params, tokens: jax.Array) -> jax.Array:
    """Keys and values of the first layer serve all layers."""
    x = params["embed"][tokens]
    _, k, v = projected(params["layers"][0], rms_norm(x, params["layers"][0]["norm1"]))
    for layer in params["layers"]:
        q = split_heads(rms_norm(x, layer["norm1"]) @ layer["wq"])
        x = x + merged(layer, attention(q, k, v))
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def with_experts(seed: int) -> Params:
    params, rng = decoder_params(seed), np.random.default_rng(seed + 1000)
    for layer in params["layers"]:
        layer["router"] = normal(rng, WIDTH, EXPERTS, std=1.0)
        layer["ups"] = normal(rng, EXPERTS, WIDTH, HIDDEN)
        layer["downs"] = normal(rng, EXPERTS, HIDDEN, WIDTH, std=1.0 / math.sqrt(HIDDEN))
    return params


DECODERS = (
    Variant("parallel_blocks", lambda: (parallel, decoder_params(100))),
    Variant("post_norm", lambda: (post_norm, decoder_params(101))),
    Variant("tied_head", lambda: (tied_head, decoder_params(102))),
    Variant("one_hot_embedding", lambda: (one_hot_embedding, decoder_params(103))),
    Variant("tokens_before_batch", lambda: (tokens_before_batch, decoder_params(104))),
    Variant(
        "head_by_head",
        lambda: (decoder(head_by_head), decoder_params(105)),
        layers=LAYERS * HEADS,
        notes="every head is matched by itself",
    ),
    Variant("experts_top_two", lambda: (lambda p, x: routed(p, x, top_two), with_experts(106))),
    Variant(
        "experts_by_threshold",
        lambda: (lambda p, x: routed(p, x, top_two_by_threshold), with_experts(106)),
        notes="sorts along the experts",
        twin=lambda: (lambda p, x: routed(p, x, top_two), with_experts(106)),
    ),
    Variant(
        "experts_looked_up",
        lambda: (looked_up, with_experts(106)),
        notes="a look-up by counting indices, which has no meaning where tokens are a flat list",
        twin=lambda: (lambda p, x: routed(p, x, top_two), with_experts(106)),
    ),
    Variant("no_attention", lambda: (no_attention, decoder_params(107)), layers=0),
    Variant("shared_cache", lambda: (shared_cache, decoder_params(108))),
)
