"""Whole models as their authors would publish them, in nnx, linen and plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from tests.variants.base import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MAX_LEN,
    VOCAB,
    WIDTH,
    Params,
    Variant,
    decoder_params,
    init_linen,
    init_nnx,
    normal,
    rms_norm,
)


class LlamaAttention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int) -> nnx.Linear:
            return nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)

        self.q_proj = linear(WIDTH, HEADS * HEAD_DIM)
        self.k_proj = linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.v_proj = linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.o_proj = linear(HEADS * HEAD_DIM, WIDTH)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        q = self.rotate(self.q_proj(x).reshape(b, t, HEADS, HEAD_DIM), cos, sin)
        k = self.rotate(self.k_proj(x).reshape(b, t, KV_HEADS, HEAD_DIM), cos, sin)
        v = self.v_proj(x).reshape(b, t, KV_HEADS, HEAD_DIM)
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1))

    @staticmethod
    def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x1, x2 = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class LlamaLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.input_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = LlamaAttention(rngs)
        self.post_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x = x + self.attention(self.input_norm(x), cos, sin)
        h = self.post_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """Angles computed once a call, [t, 1, d / 2], and handed to every layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([LlamaLayer(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[-1])
        inverse = 10_000.0 ** -(jnp.arange(0, HEAD_DIM, 2, dtype=jnp.float32) / HEAD_DIM)
        angles = jnp.outer(positions, inverse)[:, None, :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


class Gpt2Block(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, c = x.shape
        h = linen.LayerNorm(name="ln_1")(x)
        qkv = linen.Dense(3 * c, name="c_attn")(h)
        q, k, v = jnp.split(qkv.reshape(b, t, 3 * HEADS, HEAD_DIM), 3, axis=2)
        w = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(HEAD_DIM).astype(x.dtype)
        w = jnp.where(linen.make_causal_mask(x[..., 0], dtype=bool), w, jnp.finfo(w.dtype).min)
        a = jnp.einsum("bhqk,bkhd->bqhd", linen.softmax(w), v).reshape(b, t, c)
        x = x + linen.Dropout(0.1, deterministic=True)(linen.Dense(c, name="c_proj")(a))
        h = linen.gelu(linen.Dense(4 * c, name="c_fc")(linen.LayerNorm(name="ln_2")(x)), approximate=True)
        return x + linen.Dropout(0.1, deterministic=True)(linen.Dense(c, name="mlp_proj")(h))


class Gpt2(linen.Module):
    """Learned positions and a head tied through `attend`."""

    def setup(self) -> None:
        self.wte = linen.Embed(VOCAB, WIDTH)
        self.wpe = linen.Embed(MAX_LEN, WIDTH)
        self.h = [Gpt2Block() for _ in range(LAYERS)]
        self.ln_f = linen.LayerNorm()

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None], input_ids.shape)
        x = self.wte(input_ids.astype("i4")) + self.wpe(positions.astype("i4"))
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


def gpt_neox(params: Params, tokens: jax.Array) -> jax.Array:
    """Parallel residual, a quarter of each head rotated, queries, keys and values interleaved by head."""
    b, t = tokens.shape
    rotated = HEAD_DIM // 2
    angles = jnp.arange(t)[:, None] * (10000.0 ** (-jnp.arange(0, rotated, 2) / rotated))
    cos, sin = (jnp.tile(f(angles), 2)[:, None] for f in (jnp.cos, jnp.sin))  # [t, 1, rotated]

    def rope(x: jax.Array) -> jax.Array:
        turning, still = x[..., :rotated], x[..., rotated:]
        half = jnp.concatenate([-turning[..., rotated // 2 :], turning[..., : rotated // 2]], axis=-1)
        return jnp.concatenate([turning * cos + half * sin, still], axis=-1)

    x = params["embed"][tokens]
    for layer in params["layers"]:
        qkv = (rms_norm(x, layer["norm1"]) @ layer["qkv"]).reshape(b, t, HEADS, 3 * HEAD_DIM)
        q, k, v = jnp.split(qkv, [HEAD_DIM, 2 * HEAD_DIM], axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", rope(q), rope(k)) / np.sqrt(HEAD_DIM)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v).reshape(b, t, WIDTH)
        hidden = jax.nn.gelu(rms_norm(x, layer["norm2"]) @ layer["up"])
        x = x + mixed @ layer["wo"] + hidden @ layer["down"]
    return rms_norm(x, params["norm"]) @ params["unembed"]


def gpt_neox_params(seed: int) -> Params:
    params = decoder_params(seed)
    for layer in params["layers"]:
        per_head = [layer.pop(w).reshape(WIDTH, HEADS, HEAD_DIM) for w in ("wq", "wk", "wv")]
        layer["qkv"] = jnp.concatenate(per_head, axis=-1).reshape(WIDTH, -1)
    return params


def gemma2(params: Params, tokens: jax.Array) -> jax.Array:
    """Keys and values in one einsum, caps on scores and logits, norms on both sides, window then global."""
    x = params["embed"][tokens] * jnp.sqrt(WIDTH)
    positions = jnp.arange(tokens.shape[1])
    causal = positions[None, :, None] >= positions[None, None, :]  # [1, t, s]
    sliding = causal & (positions[None, None, :] > positions[None, :, None] - 8)

    def rope(x: jax.Array) -> jax.Array:
        timescale = 10_000.0 ** (2.0 * jnp.arange(HEAD_DIM // 2) / HEAD_DIM)
        radians = positions[None, :, None, None] / timescale
        first, second = jnp.split(x, 2, axis=-1)
        sin, cos = jnp.sin(radians), jnp.cos(radians)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    for i, layer in enumerate(params["layers"]):
        h = rms_norm(x, layer["norm1"])
        q = rope(jnp.einsum("BTD,NDH->BTNH", h, layer["q_einsum"])) * HEAD_DIM**-0.5
        k, v = jnp.einsum("BSD,CKDH->CBSKH", h, layer["kv_einsum"])
        q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, rope(k))
        logits = jnp.tanh(logits / 5.0) * 5.0
        mask = causal if i % 2 else sliding
        weights = jax.nn.softmax(jnp.where(mask[:, :, None, None, :], logits, -2.3819763e38), axis=-1)
        encoded = jnp.einsum("BTKGS,BSKH->BTKGH", weights, v).reshape(*x.shape[:2], HEADS, HEAD_DIM)
        x = x + rms_norm(jnp.einsum("BTNH,NHD->BTD", encoded, layer["o_einsum"]), layer["after1"])
        h = rms_norm(x, layer["norm2"])
        gate, up = jnp.einsum("BTD,CDF->CBTF", h, layer["gating"])
        x = x + rms_norm((jax.nn.gelu(gate) * up) @ layer["down"], layer["after2"])
    return jnp.tanh(rms_norm(x, params["norm"]) @ params["embed"].T / 10.0) * 10.0


def gemma2_params(seed: int) -> Params:
    params, rng = decoder_params(seed, KV_HEADS), np.random.default_rng(seed + 1000)
    params["embed"] *= WIDTH**-0.5
    del params["unembed"]
    for layer in params["layers"]:
        q, k, v, o = [layer.pop(w) for w in ("wq", "wk", "wv", "wo")]
        layer["q_einsum"] = q.reshape(WIDTH, HEADS, HEAD_DIM).transpose(1, 0, 2)
        layer["kv_einsum"] = jnp.stack(
            [w.reshape(WIDTH, KV_HEADS, HEAD_DIM).transpose(1, 0, 2) for w in (k, v)]
        )
        layer["o_einsum"] = o.reshape(HEADS, HEAD_DIM, WIDTH)
        layer["gating"] = jnp.stack([layer.pop("up"), normal(rng, WIDTH, HIDDEN)])
        layer |= {"after1": 1.0 + normal(rng, WIDTH, std=0.1), "after2": 1.0 + normal(rng, WIDTH, std=0.1)}
    return params


DECODERS = (
    Variant("llama", lambda: init_nnx(Llama, 130)),
    Variant("gpt2", lambda: init_linen(Gpt2(), 131)),
    Variant("gpt_neox", lambda: (gpt_neox, gpt_neox_params(132))),
    Variant("gemma2", lambda: (gemma2, gemma2_params(133)), notes="window of 8, then all"),
)
