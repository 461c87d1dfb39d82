"""Qwen 3 with experts: many small feed-forwards, of which each token gets a few. https://arxiv.org/abs/2505.09388"""

from flax import nnx

from xlathe.models.family import ATTENTION, DECODER, FEED_FORWARD, Family
from xlathe.models.layers import Block, Decoder, GatedFeedForward
from xlathe.models.moe import Choice, SoftmaxRouter, SparseFeedForward
from xlathe.models.qwen3 import attention
from xlathe.models.resize import count_experts, resize_separate
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `qwen3_moe` describes."""
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    activation = read_activation(settings)
    slides = settings.flag("use_sliding_window", False)
    window = settings.size("sliding_window", 4096) if slides else None  # on all layers, whatever max_window_layers is
    choice = Choice(
        experts=settings.size("num_experts", settings.size("num_local_experts", 128)),
        chosen=settings.size("num_experts_per_tok", 8),
        normalized=settings.flag("norm_topk_prob", False),
    )
    step, dense = settings.size("decoder_sparse_step", 1), settings.values.get("mlp_only_layers") or ()

    def feed_forward(index: int) -> nnx.Module:
        if index in dense or (index + 1) % step:
            return GatedFeedForward(sizes.width, sizes.hidden, activation, rngs=rngs)
        router = SoftmaxRouter(sizes.width, choice, rngs=rngs)
        return SparseFeedForward(sizes.width, settings.size("moe_intermediate_size"), router, activation, rngs=rngs)

    def block(index: int) -> Block:
        return Block(norm(), attention(settings, sizes, max_len, window, rngs), norm(), feed_forward(index))

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


EXPERTS = {
    f"layers/*/feed_forward/experts/*/{part}/kernel": f"model.layers.*.mlp.experts.*.{part}_proj.weight"
    for part in ("gate", "up", "down")
} | {"layers/*/feed_forward/router/gate/kernel": "model.layers.*.mlp.gate.weight"}
"""The names that most decoders with experts follow."""

FAMILY = Family(
    "Qwen3MoeForCausalLM",
    build,
    DECODER | ATTENTION | FEED_FORWARD | EXPERTS,
    resize=lambda shapes, settings: resize_separate(shapes, settings) | count_experts(shapes, "num_experts"),
)
