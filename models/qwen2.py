"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values, and windows on its upper layers if asked for.

https://arxiv.org/abs/2407.10671
"""

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.layers import Attention, Block, Decoder, GatedFeedForward
from xlathe.models.rope import read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation, read_upper_windows


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `qwen2` describes."""
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    rope, activation = read_rope(settings, sizes.heads.dim, max_len), read_activation(settings)
    windows = read_upper_windows(settings, sizes.layers)

    def block(index: int) -> Block:
        attention = Attention(sizes.width, sizes.heads, rope, bias=True, window=windows[index], rngs=rngs)
        return Block(norm(), attention, norm(), GatedFeedForward(sizes.width, sizes.hidden, activation, rngs=rngs))

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


FAMILY = Family("Qwen2ForCausalLM", build, DECODER | ATTENTION | FEED_FORWARD, indexed=("use_sliding_window",))
