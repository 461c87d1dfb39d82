"""Qwen 3: queries and keys are normalized head by head before they are rotated. https://arxiv.org/abs/2505.09388"""

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.layers import Attention, Block, Decoder, GatedFeedForward
from xlathe.models.rope import read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation, read_upper_windows


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `qwen3` describes."""
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    windows = read_upper_windows(settings, sizes.layers)

    def block(index: int) -> Block:
        feed_forward = GatedFeedForward(sizes.width, sizes.hidden, read_activation(settings), rngs=rngs)
        return Block(norm(), attention(settings, sizes, max_len, windows[index], rngs), norm(), feed_forward)

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


def attention(settings: Settings, sizes: Sizes, max_len: int, window: int | None, rngs: nnx.Rngs) -> Attention:
    """Makes the attention of a layer, which the models with experts share."""
    bias = settings.flag("attention_bias", False)
    return Attention(
        sizes.width,
        sizes.heads,
        read_rope(settings, sizes.heads.dim, max_len),
        bias=bias,
        output_bias=bias,
        head_norm=sizes.head_norm(rngs),
        window=window,
        rngs=rngs,
    )


FAMILY = Family("Qwen3ForCausalLM", build, DECODER | ATTENTION | FEED_FORWARD, indexed=("use_sliding_window",))
