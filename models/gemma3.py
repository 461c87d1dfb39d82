"""Gemma 3: most layers see a window and rotate by another base than the few that see all; heads are normalized.

https://arxiv.org/abs/2503.19786. The text model.
"""

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
from xlathe.models.rope import Rope, read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import read_windows


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `gemma3_text` describes."""
    settings = settings.with_defaults(sliding_window=4096)
    sizes = read_sizes(settings)
    heads, norm, bias = read_heads(settings, sizes), make_norm(sizes), settings.flag("attention_bias", False)
    pattern = settings.size("sliding_window_pattern", settings.size("_sliding_window_pattern", 6))
    windows = read_windows(settings, sizes.layers, lambda index: (index + 1) % pattern != 0)
    ropes = {sliding: _rope(settings, heads.dim, max_len, sliding) for sliding in (False, True)}
    settings.refuse("attn_logit_softcapping", unless=None, why="scores of Gemma 3 are not bounded")

    def block(index: int) -> SandwichBlock:
        attention = Attention(
            sizes.width,
            heads,
            ropes[windows[index] is not None],
            bias=bias,
            output_bias=bias,
            head_norm=make_norm(sizes, heads.dim),
            window=windows[index],
            rngs=rngs,
        )
        return SandwichBlock(norm, attention, feed_forward(settings, sizes, rngs))

    return decoder(settings, sizes, block, rngs)


def _rope(settings: Settings, dim: int, max_len: int, sliding: bool) -> Rope:
    """Before version 5 of transformers, windows rotated by `rope_local_base_freq`, unscaled."""
    if sliding and not settings.has("rope_parameters"):
        return Rope.plain(dim, settings.positive("rope_local_base_freq", 10_000.0))
    default = settings.with_defaults(rope_theta=1e6)
    return read_rope(default, dim, max_len, "sliding_attention" if sliding else "full_attention")


FAMILY = Family(
    "Gemma3ForCausalLM",
    build,
    DECODER | NORMS | ATTENTION | FEED_FORWARD,
    adapt=keep_embedding_scale,
    indexed=("sliding_window",),
)
