"""Llama 1 to 3: pre-norm residual blocks (RMSNorm), rotary positions, grouped-query attention and SwiGLU.

Touvron et al., "LLaMA", https://arxiv.org/abs/2302.13971; Llama 3: https://arxiv.org/abs/2407.21783.
"""

import dataclasses
import functools
from typing import final

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.layers import ACTIVATIONS, Attention, Block, Decoder, GatedFeedForward, Heads
from xlathe.models.rope import Rope, read_rope
from xlathe.models.settings import Settings


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model: `width` is the residual stream's, `hidden` the feed-forward layer's.

    rope: in place of the plain embedding with `rope_theta`.
    """

    vocab: int
    width: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    hidden: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    tied: bool = True
    attention_bias: bool = False
    feed_forward_bias: bool = False
    rope: Rope | None = None


@final
class Llama(Decoder):
    """`model(tokens)`: int32 [b, t] to float32 logits [b, t, vocab]."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        norm = functools.partial(nnx.RMSNorm, config.width, epsilon=config.norm_epsilon, rngs=rngs)

        def block(index: int) -> Block:
            return Block(norm(), attention(config, rngs), norm(), feed_forward(config, rngs))

        super().__init__(config.vocab, config.width, config.layers, block, norm, tied=config.tied, rngs=rngs)


def attention(config: LlamaConfig, rngs: nnx.Rngs) -> Attention:
    heads = Heads(config.query_heads, config.key_value_heads, config.head_dim)
    rope = config.rope or Rope.plain(config.head_dim, config.rope_theta)
    bias = config.attention_bias
    return Attention(config.width, heads, rope, bias=bias, output_bias=bias, rngs=rngs)


def feed_forward(config: LlamaConfig, rngs: nnx.Rngs) -> GatedFeedForward:
    activation, bias = ACTIVATIONS[config.activation], config.feed_forward_bias
    return GatedFeedForward(config.width, config.hidden, activation, bias=bias, rngs=rngs)


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Llama:
    """Builds the model that a `config.json` of the type `llama` describes."""
    heads = settings.size("num_attention_heads")
    head_dim = settings.size("head_dim", settings.size("hidden_size") // heads)
    config = LlamaConfig(
        vocab=settings.size("vocab_size"),
        width=settings.size("hidden_size"),
        layers=settings.size("num_hidden_layers"),
        query_heads=heads,
        key_value_heads=settings.size("num_key_value_heads", heads),
        head_dim=head_dim,
        hidden=settings.size("intermediate_size"),
        norm_epsilon=settings.positive("rms_norm_eps", 1e-6),
        activation=settings.one_of("hidden_act", ACTIVATIONS, "silu"),
        tied=settings.flag("tie_word_embeddings", False),
        attention_bias=settings.flag("attention_bias", False),
        feed_forward_bias=settings.flag("mlp_bias", False),
        rope=read_rope(settings, head_dim, max_len),
    )
    return Llama(config, rngs=rngs)


FAMILY = Family("LlamaForCausalLM", build, DECODER | ATTENTION | FEED_FORWARD)
