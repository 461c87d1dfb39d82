"""Llama 1 to 3: pre-norm residual blocks (RMSNorm), rotary positions, grouped-query attention and SwiGLU.

Touvron et al., "LLaMA", https://arxiv.org/abs/2302.13971; Llama 3: https://arxiv.org/abs/2407.21783.
"""

import dataclasses
import functools
from typing import Any, final

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.layers import Attention, Block, Decoder, GatedFeedForward, Heads
from xlathe.models.rope import Rope, read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


@dataclasses.dataclass(frozen=True)
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


@final
class Llama(Decoder):
    """`model(tokens)`: int32 [b, t] to float32 logits [b, t, vocab]; the embedding is the output layer too."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        norm = functools.partial(nnx.RMSNorm, config.width, epsilon=config.norm_epsilon, rngs=rngs)
        heads = Heads(config.query_heads, config.key_value_heads, config.head_dim)
        rope = Rope.plain(config.head_dim, config.rope_theta)

        def block(index: int) -> Block:
            return Block(
                norm(),
                Attention(config.width, heads, rope, rngs=rngs),
                norm(),
                GatedFeedForward(config.width, config.hidden, rngs=rngs),
            )

        super().__init__(config.vocab, config.width, config.layers, block, norm, rngs=rngs)


def describe(config: LlamaConfig, positions: int) -> dict[str, Any]:
    """Returns the `config.json` of a `Llama`; positions: the longest text that it was trained on."""
    return {
        "model_type": "llama",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `llama` describes."""
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    rope, activation = read_rope(settings, sizes.heads.dim, max_len), read_activation(settings)
    attention_bias, bias = settings.flag("attention_bias", False), settings.flag("mlp_bias", False)

    def block(index: int) -> Block:
        attention = Attention(
            sizes.width, sizes.heads, rope, bias=attention_bias, output_bias=attention_bias, rngs=rngs
        )
        feed_forward = GatedFeedForward(sizes.width, sizes.hidden, activation, bias=bias, rngs=rngs)
        return Block(norm(), attention, norm(), feed_forward)

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


FAMILY = Family("LlamaForCausalLM", build, DECODER | ATTENTION | FEED_FORWARD)
