"""Mistral: a Llama whose tokens see a sliding window. https://arxiv.org/abs/2310.06825"""

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.layers import Attention, Block, Decoder, GatedFeedForward
from xlathe.models.rope import read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `mistral` describes."""
    settings = settings.with_defaults(sliding_window=4096)
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    rope, activation = read_rope(settings, sizes.heads.dim, max_len), read_activation(settings)
    window = settings.optional_size("sliding_window")

    def block(index: int) -> Block:
        attention = Attention(sizes.width, sizes.heads, rope, window=window, rngs=rngs)
        return Block(norm(), attention, norm(), GatedFeedForward(sizes.width, sizes.hidden, activation, rngs=rngs))

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


FAMILY = Family("MistralForCausalLM", build, DECODER | ATTENTION | FEED_FORWARD)
