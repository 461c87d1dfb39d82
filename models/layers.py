"""What the families share: grouped-query attention, the gated feed-forward, and the decoder around the layers.

Plain forwards over whole sequences. There is no cache, no decode flag and no position argument: the compiler derives
the incremental step from these.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.models.rope import Rope

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: Mapping[str, Activation] = {  # by their names in config.json
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_fast": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = False) -> nnx.Linear:
    """A projection whose `kernel` is [inputs, outputs]."""
    return nnx.Linear(inputs, outputs, use_bias=bias, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of an attention layer. Query head i reads the key-value head i // (queries / keys_values).

    dim: channels of a head; scale: what scores are multiplied by, 1 / sqrt(dim) where it is None.
    """

    queries: int
    keys_values: int
    dim: int
    scale: float | None = None


def attend(
    query: jax.Array,  # [b, t, queries, dim]
    key: jax.Array,  # [b, t, keys_values, dim]
    value: jax.Array,  # [b, t, keys_values, dim]
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention (https://arxiv.org/abs/2305.13245): [b, t, queries, dim].

    window: how many tokens a token sees, itself included; soft_cap: scores become cap * tanh(scores / cap),
    https://arxiv.org/abs/2408.00118.
    """
    if window is None and soft_cap is None:
        return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True)
    distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if soft_cap is None:
        return jax.nn.dot_product_attention(query, key, value, scale=scale, mask=seen[None, None])
    b, t, heads, dim = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap * jnp.tanh(scores * (dim**-0.5 if scale is None else scale) / soft_cap)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(b, t, heads, dim)


class Attention(nnx.Module):
    """Projections around `attend`.

    rope: rotates queries and keys; head_norm: makes the norms of queries and keys over the channels of a head, applied
    before the rotation (Qwen 3, Gemma 3).
    """

    def __init__(
        self,
        width: int,
        heads: Heads,
        rope: Rope,
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        output_bias: bool = False,
        head_norm: Callable[[], nnx.Module] | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        self.heads, self.rope, self.window, self.soft_cap = heads, rope, window, soft_cap
        self.query = linear(width, heads.queries * heads.dim, rngs, bias)
        self.key = linear(width, heads.keys_values * heads.dim, rngs, bias)
        self.value = linear(width, heads.keys_values * heads.dim, rngs, bias)
        self.output = linear(heads.queries * heads.dim, width, rngs, output_bias)
        self.query_norm = head_norm() if head_norm else None
        self.key_norm = head_norm() if head_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        query, key, value = (part(x).reshape(b, t, -1, self.heads.dim) for part in (self.query, self.key, self.value))
        if self.query_norm and self.key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed = attend(
            self.rope(query),
            self.rope(key),
            value,
            scale=self.heads.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return self.output(mixed.reshape(b, t, -1))


class GatedFeedForward(nnx.Module):
    """down(activation(gate(x)) * up(x)): a gated linear unit, https://arxiv.org/abs/2002.05202."""

    def __init__(
        self, width: int, hidden: int, activation: Activation = jax.nn.silu, *, rngs: nnx.Rngs, bias: bool = False
    ) -> None:
        self.activation = activation
        self.gate = linear(width, hidden, rngs, bias)
        self.up = linear(width, hidden, rngs, bias)
        self.down = linear(hidden, width, rngs, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class FeedForward(nnx.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.up = linear(width, hidden, rngs, bias=True)
        self.down = linear(hidden, width, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))


class Block(nnx.Module):
    """One pre-norm layer: attention, then feed-forward, each of them added to the residual stream."""

    def __init__(
        self, attention_norm: nnx.Module, attention: nnx.Module, feed_forward_norm: nnx.Module, feed_forward: nnx.Module
    ) -> None:
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """`model(tokens)`: int32 [b, t] to float32 logits [b, t, vocab]; logits at i depend on tokens up to i.

    block: makes layer i; tied: whether the embedding is the output layer too; scaled: whether embeddings are
    multiplied by sqrt(width) (Gemma); soft_cap: bounds the logits, as in `attend`.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        block: Callable[[int], nnx.Module],
        norm: Callable[[], nnx.Module],
        *,
        rngs: nnx.Rngs,
        tied: bool = True,
        scaled: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        self.scale, self.soft_cap = math.sqrt(width) if scaled else None, soft_cap
        small = nnx.initializers.normal(0.02)  # where it is the output layer too: the first logits are near 0
        self.embedding = nnx.Embed(vocab, width, embedding_init=small, rngs=rngs)
        self.layers = nnx.List([block(i) for i in range(layers)])
        self.norm = norm()
        self.head = None if tied else linear(width, vocab, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, x.dtype)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        logits = (self.embedding.attend(x) if self.head is None else self.head(x)).astype(jnp.float32)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)
