"""Gemma 2: every other layer sees a window, scores and logits are soft-capped. https://arxiv.org/abs/2408.00118"""

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.gemma import (
    NORMS,
    SandwichBlock,
    decoder,
    feed_forward,
    keep_embedding_scale,
    make_norm,
    read_heads,
    read_sizes,
)
from xlathe.models.layers import Attention, Decoder
from xlathe.models.rope import read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import read_windows


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `gemma2` describes."""
    settings = settings.with_defaults(sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    sizes = read_sizes(settings)
    heads, norm = read_heads(settings, sizes), make_norm(sizes)
    rope, bias = read_rope(settings, heads.dim, max_len), settings.flag("attention_bias", False)
    windows = read_windows(settings, sizes.layers, lambda index: index % 2 == 0)
    soft_cap = settings.optional_number("attn_logit_softcapping")

    def block(index: int) -> SandwichBlock:
        attention = Attention(
            sizes.width,
            heads,
            rope,
            bias=bias,
            output_bias=bias,
            window=windows[index],
            soft_cap=soft_cap,
            rngs=rngs,
        )
        return SandwichBlock(norm, attention, feed_forward(settings, sizes, rngs))

    return decoder(settings, sizes, block, rngs)


FAMILY = Family(
    "Gemma2ForCausalLM",
    build,
    DECODER | NORMS | ATTENTION | FEED_FORWARD,
    adapt=keep_embedding_scale,
    indexed=("sliding_window",),
)
