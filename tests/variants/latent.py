"""Latent attention (MLA): keys and values of all heads are projections of one narrow latent a token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests.variants.base import (
    FLAT,
    HEAD_DIM,
    HEADS,
    SHARP,
    WIDTH,
    Params,
    Variant,
    decoder,
    decoder_params,
    merged,
    normal,
    rms_norm,
    split_heads,
)
from tests.variants.blocks import attention

LATENT, ROTARY, PLAIN, VALUE = 12, 4, 8, 6  # features: of a latent; of a key, rotated and not; of a value

type Scores = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def without_rotary_part(layer: Params, x: jax.Array) -> jax.Array:
    compressed = rms_norm(x @ layer["down_kv"], jnp.ones(HEAD_DIM))  # [b, t, 8]
    k = jnp.einsum("btc,chd->bthd", compressed, layer["up_k"])
    v = jnp.einsum("btc,chd->bthd", compressed, layer["up_v"])
    return merged(layer, attention(split_heads(x @ layer["wq"]), k, v))


def one_head_a_key(
    q: jax.Array,  # [b, h, t, PLAIN]
    q_rotary: jax.Array,  # [b, h, t, ROTARY]
    k: jax.Array,  # [b, h, t, PLAIN]
    k_rotary: jax.Array,  # [b, 1, t, ROTARY]
) -> jax.Array:
    """Every head gets a copy of the rotary key (DeepSeek-V2 in transformers)."""
    copies = jnp.broadcast_to(k_rotary, (*k.shape[:3], ROTARY))
    keys = jnp.concatenate([k, copies], axis=-1)
    return jnp.concatenate([q, q_rotary], axis=-1) @ keys.swapaxes(-1, -2)


def two_products(q: jax.Array, q_rotary: jax.Array, k: jax.Array, k_rotary: jax.Array) -> jax.Array:
    """Two products are added (DeepSeek's own code)."""
    plain = jnp.einsum("bhsd,bhtd->bhst", q, k)
    return plain + jnp.einsum("bhsr,btr->bhst", q_rotary, k_rotary[:, 0])


def rotate(x: jax.Array) -> jax.Array:
    """[..., t, ROTARY]"""
    angles = jnp.arange(x.shape[-2])[:, None] * 10.0 ** -jnp.arange(ROTARY // 2)
    low, high = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def with_rotary_part(scores_of: Scores) -> Callable[[Params, jax.Array], jax.Array]:
    def attend(layer: Params, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        queries = (x @ layer["wq"]).reshape(b, t, HEADS, PLAIN + ROTARY).transpose(0, 2, 1, 3)
        narrow = x @ layer["down_kv"]  # [b, t, LATENT + ROTARY]
        latent = rms_norm(narrow[..., :LATENT], layer["latent_norm"])
        heads = (latent @ layer["up_kv"]).reshape(b, t, HEADS, PLAIN + VALUE).transpose(0, 2, 1, 3)
        k, v = heads[..., :PLAIN], heads[..., PLAIN:]
        k_rotary = rotate(narrow[:, None, :, LATENT:])
        scores = scores_of(queries[..., :PLAIN], rotate(queries[..., PLAIN:]), k, k_rotary)
        scores = jnp.where(jnp.tri(t, dtype=bool), scores * (PLAIN + ROTARY) ** -0.5, -jnp.inf)
        out = jax.nn.softmax(scores, axis=-1) @ v  # [b, h, t, VALUE]
        return out.transpose(0, 2, 1, 3).reshape(b, t, -1) @ layer["wo"]

    return attend


def simple_params(seed: int) -> Params:
    params, rng = decoder_params(seed), np.random.default_rng(seed + 1000)
    for layer in params["layers"]:
        del layer["wk"], layer["wv"]
        layer["down_kv"] = normal(rng, WIDTH, HEAD_DIM)
        layer["up_k"] = normal(rng, HEAD_DIM, HEADS, HEAD_DIM, std=1.6 / math.sqrt(HEAD_DIM))
        layer["up_v"] = normal(rng, HEAD_DIM, HEADS, HEAD_DIM, std=1.0 / math.sqrt(HEAD_DIM))
    return params


def rotary_params(seed: int) -> Params:
    params, rng = decoder_params(seed), np.random.default_rng(seed + 1000)
    for layer in params["layers"]:
        del layer["wk"], layer["wv"]
        layer["wq"] = normal(rng, WIDTH, HEADS * (PLAIN + ROTARY), std=SHARP)
        layer["down_kv"] = normal(rng, WIDTH, LATENT + ROTARY, std=SHARP)
        layer["latent_norm"] = 1.0 + normal(rng, LATENT, std=0.1)
        layer["up_kv"] = normal(rng, LATENT, HEADS * (PLAIN + VALUE), std=1.0 / math.sqrt(LATENT))
        layer["wo"] = normal(rng, HEADS * VALUE, WIDTH, std=FLAT)
    return params


DECODERS = (
    Variant("latent_attention", lambda: (decoder(without_rotary_part), simple_params(109))),
    Variant("latent_and_rotary_key", lambda: (decoder(with_rotary_part(one_head_a_key)), rotary_params(110))),
    Variant(
        "latent_in_two_products",
        lambda: (decoder(with_rotary_part(two_products)), rotary_params(110)),
        twin=lambda: (decoder(with_rotary_part(one_head_a_key)), rotary_params(110)),
    ),
)
