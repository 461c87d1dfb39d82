"""Mixtral: a Mistral whose feed-forwards are experts, two a token. https://arxiv.org/abs/2401.04088"""

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, Family
from xlathe.models.layers import Attention, Block, Decoder
from xlathe.models.moe import Choice, SoftmaxRouter, SparseFeedForward
from xlathe.models.resize import resize_experts
from xlathe.models.rope import read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `mixtral` describes."""
    settings = settings.with_defaults(rms_norm_eps=1e-5, rope_theta=1e6)
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    rope, activation = read_rope(settings, sizes.heads.dim, max_len), read_activation(settings)
    window = settings.optional_size("sliding_window")
    choice = Choice(settings.size("num_local_experts", 8), settings.size("num_experts_per_tok", 2))

    def block(index: int) -> Block:
        attention = Attention(sizes.width, sizes.heads, rope, window=window, rngs=rngs)
        router = SoftmaxRouter(sizes.width, choice, rngs=rngs)
        return Block(
            norm(), attention, norm(), SparseFeedForward(sizes.width, sizes.hidden, router, activation, rngs=rngs)
        )

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


_EXPERTS = {
    f"layers/*/feed_forward/experts/*/{ours}/kernel": f"model.layers.*.block_sparse_moe.experts.*.{theirs}.weight"
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
_ROUTER = {"layers/*/feed_forward/router/gate/kernel": "model.layers.*.block_sparse_moe.gate.weight"}

FAMILY = Family("MixtralForCausalLM", build, DECODER | ATTENTION | _EXPERTS | _ROUTER, resize=resize_experts)
