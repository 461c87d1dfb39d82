"""BERT: an encoder, whose tokens all see one another but for padding. https://arxiv.org/abs/1810.04805

It takes a padding mask and token types beside the tokens and returns what its last layer says of each token.
"""

import functools
from typing import final

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.models.family import Family
from xlathe.models.layers import FeedForward, linear
from xlathe.models.settings import Settings
from xlathe.models.sizes import read_activation


class Attention(nnx.Module):
    """Attention to every token that is no padding."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query, self.key, self.value, self.output = (linear(width, width, rngs, bias=True) for _ in range(4))

    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:  # seen: [b, t]
        b, t, _ = x.shape
        query, key, value = (part(x).reshape(b, t, self.heads, -1) for part in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=seen[:, None, None, :])
        return self.output(mixed.reshape(b, t, -1))


class Layer(nnx.Module):
    """One layer: what each half adds is normalized afterwards, the residual stream with it."""

    def __init__(self, settings: Settings, norm: functools.partial[nnx.LayerNorm], *, rngs: nnx.Rngs) -> None:
        width = settings.size("hidden_size")
        self.attention = Attention(width, settings.size("num_attention_heads"), rngs=rngs)
        self.attention_norm = norm()
        activation = read_activation(settings, default="gelu")
        self.feed_forward = FeedForward(width, settings.size("intermediate_size"), activation, rngs=rngs)
        self.feed_forward_norm = norm()

    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, seen))
        return self.feed_forward_norm(x + self.feed_forward(x))


@final
class Bert(nnx.Module):
    """`model(tokens, attention_mask=, token_type_ids=)`: int32 [b, t] each to float32 [b, t, width]."""

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs) -> None:
        width = settings.size("hidden_size")
        norm = functools.partial(nnx.LayerNorm, width, epsilon=settings.positive("layer_norm_eps", 1e-12), rngs=rngs)
        self.embedding = nnx.Embed(settings.size("vocab_size"), width, rngs=rngs)
        self.positions = nnx.Embed(settings.size("max_position_embeddings"), width, rngs=rngs)
        self.types = nnx.Embed(settings.size("type_vocab_size", 2), width, rngs=rngs)
        self.norm = norm()
        layers = settings.size("num_hidden_layers")
        self.layers = nnx.List([Layer(settings, norm, rngs=rngs) for _ in range(layers)])

    def __call__(self, tokens: jax.Array, *, attention_mask: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        position = jnp.arange(tokens.shape[1])
        x = self.norm(self.embedding(tokens) + self.types(token_type_ids) + self.positions(position))
        for layer in self.layers:
            x = layer(x, attention_mask != 0)
        return x.astype(jnp.float32)


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Bert:
    """Builds the model that a `config.json` of the type `bert` describes."""
    settings.refuse("is_decoder", unless=False, why="only the encoder is built")
    settings.refuse("add_cross_attention", unless=False, why="only the encoder is built")
    settings.refuse("position_embedding_type", unless="absolute", why="only absolute positions are built")
    return Bert(settings, rngs=rngs)


_PARTS = {
    "embedding": ("embeddings.word_embeddings", "embedding"),
    "positions": ("embeddings.position_embeddings", "embedding"),
    "types": ("embeddings.token_type_embeddings", "embedding"),
    "norm": ("embeddings.LayerNorm", "scale"),
    "layers/*/attention/query": ("encoder.layer.*.attention.self.query", "kernel"),
    "layers/*/attention/key": ("encoder.layer.*.attention.self.key", "kernel"),
    "layers/*/attention/value": ("encoder.layer.*.attention.self.value", "kernel"),
    "layers/*/attention/output": ("encoder.layer.*.attention.output.dense", "kernel"),
    "layers/*/attention_norm": ("encoder.layer.*.attention.output.LayerNorm", "scale"),
    "layers/*/feed_forward/up": ("encoder.layer.*.intermediate.dense", "kernel"),
    "layers/*/feed_forward/down": ("encoder.layer.*.output.dense", "kernel"),
    "layers/*/feed_forward_norm": ("encoder.layer.*.output.LayerNorm", "scale"),
}

FAMILY = Family(
    "BertModel",
    build,
    {f"{ours}/{leaf}": f"{theirs}.weight" for ours, (theirs, leaf) in _PARTS.items()}
    | {f"{ours}/bias": f"{theirs}.bias" for ours, (theirs, leaf) in _PARTS.items() if leaf != "embedding"},
    resize=lambda shapes, settings: {"intermediate_size": shapes["layers/0/feed_forward/up/kernel"][1]},
    arguments=("attention_mask", "token_type_ids"),
    ignored=(r"(bert\.)?(pooler\..*|embeddings\.position_ids)", r"cls\..*"),
)
