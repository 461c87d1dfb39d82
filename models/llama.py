"""A Llama-style decoder as its author would write it: the whole sequence in, all the logits out.

There is no cache, no decode flag and no position argument: the compiler derives the incremental step from
this forward. Pre-norm residual blocks (RMSNorm), rotary positions (RoPE), grouped-query attention, SwiGLU and
a tied embedding: Touvron et al., "LLaMA", https://arxiv.org/abs/2302.13971.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model: `width` is the residual stream's, `hidden` the feed-forward layer's."""

    vocab: int
    width: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    hidden: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5


def rotary(x: jax.Array, theta: float) -> jax.Array:
    """Rotates `x` [b, t, heads, head_dim] by its position: RoPE, https://arxiv.org/abs/2104.09864.

    Channel i is paired with channel i + head_dim / 2 (the half-rotation convention), and the pair turns by
    the angle position * theta ** (-2 i / head_dim).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency  # [t, 1, half]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A bias-free projection whose `kernel` is [inputs, outputs]."""
    return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
    """Causal grouped-query attention: query heads share key-value heads, https://arxiv.org/abs/2305.13245."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        queries, keys = config.query_heads * config.head_dim, config.key_value_heads * config.head_dim
        self.query = linear(config.width, queries, rngs)
        self.key = linear(config.width, keys, rngs)
        self.value = linear(config.width, keys, rngs)
        self.output = linear(queries, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        query = self.query(x).reshape(b, t, self.config.query_heads, self.config.head_dim)
        key = self.key(x).reshape(b, t, self.config.key_value_heads, self.config.head_dim)
        value = self.value(x).reshape(b, t, self.config.key_value_heads, self.config.head_dim)
        query, key = rotary(query, self.config.rope_theta), rotary(key, self.config.rope_theta)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.reshape(b, t, -1))


class FeedForward(nnx.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = linear(config.width, config.hidden, rngs)
        self.up = linear(config.width, config.hidden, rngs)
        self.down = linear(config.hidden, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nnx.Module):
    """`model(tokens)`: int32 [b, t] to float32 logits [b, t, vocab]; logits at i depend on tokens up to i."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        small = nnx.initializers.normal(0.02)  # it is also the output layer: the first logits are near 0
        self.embedding = nnx.Embed(config.vocab, config.width, embedding_init=small, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedding.attend(self.norm(x)).astype(jnp.float32)
