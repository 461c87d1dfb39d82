"""Ways to write a causal mask: buffers, windows of three sizes, and idioms that need a concrete length."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from tests.variants.base import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    MAX_LEN,
    VOCAB,
    WIDTH,
    Params,
    Variant,
    decoder,
    decoder_params,
    init_linen,
    init_nnx,
    merged,
    mlp,
    projected,
    rms_norm,
)


def masked_attention(layer: Params, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """mask [t, t] or [b, t, t], true where a query (second-last axis) may see a key; None: all of them."""
    q, k, v = [y.transpose(0, 2, 1, 3) for y in projected(layer, x)]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(HEAD_DIM)
    if mask is not None:
        scores = jnp.where(mask if mask.ndim == 2 else mask[:, None], scores, jnp.finfo(scores.dtype).min)
    return merged(layer, jnp.einsum("bhqk,bhkd->bqhd", jax.nn.softmax(scores, axis=-1), v))


def window_difference(layer: Params, x: jax.Array) -> jax.Array:
    distance = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])[None, :]
    return masked_attention(layer, x, (distance >= 0) & (distance < 7))


def window_triangles(layer: Params, x: jax.Array) -> jax.Array:
    ones = jnp.ones((x.shape[1], x.shape[1]), dtype=bool)
    return masked_attention(layer, x, jnp.tril(ones) & jnp.logical_not(jnp.tril(ones, k=-16)))


def window_iota(layer: Params, x: jax.Array) -> jax.Array:
    t = x.shape[1]
    rows = jax.lax.broadcasted_iota(jnp.int32, (t, t), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, (t, t), 1)
    mask = jnp.logical_and(columns <= rows, columns > rows - 4096)
    return masked_attention(layer, x, mask)


def window_and_global(params: Params, tokens: jax.Array) -> jax.Array:
    """Even layers see 8 tokens, odd layers all."""
    x, t = params["embed"][tokens], tokens.shape[1]
    everything = jnp.tri(t, dtype=bool)
    local = jnp.triu(everything, k=-7)
    for i, layer in enumerate(params["layers"]):
        mask = local if i % 2 == 0 else everything
        x = x + masked_attention(layer, rms_norm(x, layer["norm1"]), mask)
        x = x + mlp(layer, rms_norm(x, layer["norm2"]))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def with_mask_parameter(params: Params, tokens: jax.Array) -> jax.Array:
    mask = params["mask"][: tokens.shape[1], : tokens.shape[1]]
    return decoder(lambda layer, x: masked_attention(layer, x, mask))(params, tokens)


def numpy_triangle(layer: Params, x: jax.Array) -> jax.Array:
    t = x.shape[1]
    return masked_attention(layer, x, jnp.asarray(np.tril(np.ones((t, t), dtype=bool))))


def no_mask_for_one_token(layer: Params, x: jax.Array) -> jax.Array:
    t, mask = x.shape[1], None
    if t > 1:
        mask = jnp.tril(jnp.ones((t, t), dtype=bool))
    return masked_attention(layer, x, mask)


PAD = 0


def padding_hidden(params: Params, tokens: jax.Array) -> jax.Array:
    """Padding is no key, except to itself: the mask depends on the tokens."""
    t = tokens.shape[1]
    visible = jnp.tri(t, dtype=bool) & (tokens != PAD)[:, None, :] | jnp.eye(t, dtype=bool)  # refused
    return decoder(lambda layer, x: masked_attention(layer, x, visible))(params, tokens)


TRIANGLE = np.tril(np.ones((1, 1, MAX_LEN, MAX_LEN), np.float32))


class LinenMaskBuffer(linen.Module):
    """Self-attention with a mask in a collection of its own, cut to size."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        t = x.shape[1]
        bias = self.variable("buffers", "bias", lambda: TRIANGLE)
        q, k, v = [linen.DenseGeneral((HEADS, HEAD_DIM), name=name)(x) for name in ("query", "key", "value")]
        att = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD_DIM)
        att = jnp.where(bias.value[:, :, :t, :t] == 0, -jnp.inf, att)
        out = jnp.einsum("bhqk,bkhd->bqhd", linen.softmax(att), v)
        return linen.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(out)


class LinenMaskBufferDecoder(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(VOCAB, WIDTH)(tokens)
        for _ in range(LAYERS):
            x = x + LinenMaskBuffer()(linen.RMSNorm()(x))
            x = x + linen.Dense(WIDTH)(linen.silu(linen.Dense(2 * WIDTH)(linen.RMSNorm()(x))))
        return linen.Dense(VOCAB)(linen.RMSNorm()(x))


def linen_mask_buffer() -> tuple[linen.Module, Params]:
    buffers = {f"LinenMaskBuffer_{i}": {"bias": jnp.asarray(TRIANGLE)} for i in range(LAYERS)}
    return init_linen(LinenMaskBufferDecoder(), 68, buffers=buffers)


def future() -> jax.Array:
    return jnp.triu(jnp.full((MAX_LEN, MAX_LEN), -1e9), k=1)


class NnxMaskBufferDecoder(nnx.Module):
    """One additive mask as a plain array attribute, shared by all layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mask = nnx.data(future())
        self.qkv = nnx.List([nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs) for _ in range(LAYERS)])
        self.out = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        b, t, d = x.shape
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = jnp.moveaxis(qkv(self.norm(x)).reshape(b, t, 3, HEADS, HEAD_DIM), (2, 3), (0, 2))
            scores = q @ k.mT / np.sqrt(HEAD_DIM) + self.mask[:t, :t]
            x = x + out((jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(b, t, d))
        return self.head(self.norm(x))


def nnx_mask_buffer() -> nnx.Module:
    model = init_nnx(NnxMaskBufferDecoder, 69)
    model.mask = future()
    return model


def with_small_vocabulary(seed: int) -> Params:
    params = decoder_params(seed)
    return params | {"embed": params["embed"][:8], "unembed": params["unembed"][:, :8]}


def with_mask(seed: int) -> Params:
    return decoder_params(seed) | {"mask": jnp.asarray(np.tril(np.ones((MAX_LEN, MAX_LEN), bool)))}


DECODERS = (
    Variant("window_7", lambda: (decoder(window_difference), decoder_params(60)), window=7),
    Variant("window_16", lambda: (decoder(window_triangles), decoder_params(61)), window=16),
    Variant(
        "window_4096",
        lambda: (decoder(window_iota), decoder_params(62, layers=1)),
        layers=1,
        max_len=8192,
        window=4096,
        notes="one layer: 4,100 tokens take 270 MB of scores",
    ),
    Variant(
        "window_and_global", lambda: (window_and_global, decoder_params(63)), notes="window of 8, then all"
    ),
    Variant("mask_parameter", lambda: (with_mask_parameter, with_mask(64)), notes="boolean weight [64, 64]"),
    Variant("mask_numpy", lambda: (decoder(numpy_triangle), decoder_params(65)), symbolic=False),
    Variant(
        "mask_if_longer_than_one",
        lambda: (decoder(no_mask_for_one_token), decoder_params(66)),
        symbolic=False,
    ),
    Variant("linen_mask_buffer", linen_mask_buffer),
    Variant("nnx_mask_buffer", nnx_mask_buffer),
)

REFUSED = (  # sound, but the cache does not keep what a mask knows of earlier tokens
    Variant(
        "mask_padding",
        lambda: (padding_hidden, with_small_vocabulary(67)),
        layers=0,
        vocab=8,
        reason="mask that depends on the tokens' values",
        author=padding_hidden,
        notes="one token in eight is padding",
    ),
)
