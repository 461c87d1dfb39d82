"""Decoders around the attention of libraries: `jax.nn.dot_product_attention`, nnx and linen modules."""

import jax
from flax import linen, nnx

from tests.variants.base import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    Params,
    Variant,
    decoder,
    decoder_params,
    init_linen,
    init_nnx,
    merged,
    projected,
)


def dot_product_attention(layer: Params, x: jax.Array) -> jax.Array:
    return merged(layer, jax.nn.dot_product_attention(*projected(layer, x), is_causal=True))


def dot_product_attention_window(layer: Params, x: jax.Array) -> jax.Array:
    q, k, v = projected(layer, x)
    return merged(layer, jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(6, 0)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.ln2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc1 = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.fc2 = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln1(x), mask=mask)
        return x + self.fc2(nnx.gelu(self.fc1(self.ln2(x))))


class NnxDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=HEADS)(y, mask=mask)
        y = linen.Dense(HIDDEN)(linen.LayerNorm()(x))
        return x + linen.Dense(WIDTH)(linen.gelu(y))


class LinenDecoder(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(VOCAB, WIDTH)(tokens)
        mask = linen.make_causal_mask(tokens)
        for i in range(LAYERS):
            x = LinenBlock(name=f"block_{i}")(x, mask)
        return linen.Dense(VOCAB, use_bias=False)(linen.LayerNorm()(x))


DECODERS = (
    Variant("nnx_multi_head_attention", lambda: init_nnx(NnxDecoder, 110)),
    Variant("linen_multi_head_attention", lambda: init_linen(LinenDecoder(), 111)),
    Variant("dot_product_attention", lambda: (decoder(dot_product_attention), decoder_params(120))),
    Variant(
        "dot_product_attention_gqa", lambda: (decoder(dot_product_attention), decoder_params(121, KV_HEADS))
    ),
    Variant(
        "dot_product_attention_window",
        lambda: (decoder(dot_product_attention_window), decoder_params(122)),
        symbolic=False,
        window=7,
        notes="local_window_size compares sizes in Python",
    ),
)
