"""DeepSeek-V3: latent attention, and experts chosen by group beside a shared one. https://arxiv.org/abs/2412.19437"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.models.family import DECODER, FEED_FORWARD, Family
from xlathe.models.layers import Block, Decoder, GatedFeedForward, linear
from xlathe.models.moe import Choice, GroupedSigmoidRouter, SparseFeedForward
from xlathe.models.qwen3_moe import EXPERTS
from xlathe.models.resize import Shapes, count_experts, feed_forward_sizes, stream_size
from xlathe.models.rope import Rope, read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """The channels of latent attention: a head's query and key have `plain` ones and `rotary` ones, its value `value`.

    query_latent: what queries are projected from, None where that is the residual stream. latent: what the keys and
    values of all heads are projected from. scale: what scores are multiplied by.
    """

    count: int
    plain: int
    rotary: int
    value: int
    query_latent: int | None
    latent: int
    scale: float

    @staticmethod
    def read(settings: Settings) -> "LatentHeads":
        plain, rotary = settings.size("qk_nope_head_dim"), settings.size("qk_rope_head_dim")
        return LatentHeads(
            count=settings.size("num_attention_heads"),
            plain=plain,
            rotary=rotary,
            value=settings.size("v_head_dim"),
            query_latent=settings.optional_size("q_lora_rank"),
            latent=settings.size("kv_lora_rank"),
            scale=(plain + rotary) ** -0.5 * _stretched(settings) ** 2,
        )


def _stretched(settings: Settings) -> float:
    """Returns what yarn multiplies queries and keys by, which the rotation alone does not reach."""
    name = "rope_parameters" if settings.has("rope_parameters") else "rope_scaling"
    found = settings.within(name) if settings.has(name) else Settings({}, settings.where)
    factor, scale = found.number("factor", 1.0), found.number("mscale_all_dim", 0.0)
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


class LatentAttention(nnx.Module):
    """Keys and values are projections of one narrow latent a token: https://arxiv.org/abs/2405.04434, section 2.1."""

    def __init__(
        self, width: int, heads: LatentHeads, rope: Rope, epsilon: float, bias: bool, *, rngs: nnx.Rngs
    ) -> None:
        self.heads, self.rope = heads, rope
        queries = heads.count * (heads.plain + heads.rotary)
        if heads.query_latent is not None:
            self.query_down = linear(width, heads.query_latent, rngs, bias)
            self.query_norm = nnx.RMSNorm(heads.query_latent, epsilon=epsilon, rngs=rngs)
            self.query_up = linear(heads.query_latent, queries, rngs)
        else:
            self.query = linear(width, queries, rngs)
        self.latent = linear(width, heads.latent + heads.rotary, rngs, bias)
        self.latent_norm = nnx.RMSNorm(heads.latent, epsilon=epsilon, rngs=rngs)
        self.key_value = linear(heads.latent, heads.count * (heads.plain + heads.value), rngs)
        self.output = linear(heads.count * heads.value, width, rngs, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads, (b, t, _) = self.heads, x.shape
        direct = heads.query_latent is None
        query = self.query(x) if direct else self.query_up(self.query_norm(self.query_down(x)))
        query = query.reshape(b, t, heads.count, -1)
        latent, rotary = jnp.split(self.latent(x), [heads.latent], axis=-1)
        both = self.key_value(self.latent_norm(latent)).reshape(b, t, heads.count, -1)
        key, value = both[..., : heads.plain], both[..., heads.plain :]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query[..., : heads.plain], key, preferred_element_type=jnp.float32)
        turned, shared = self.rope(query[..., heads.plain :]), self.rope(rotary[:, :, None])[:, :, 0]
        scores += jnp.einsum("bqhd,bkd->bhqk", turned, shared, preferred_element_type=jnp.float32)
        seen = jnp.arange(t)[:, None] >= jnp.arange(t)
        weights = jax.nn.softmax(jnp.where(seen, scores * heads.scale, -jnp.inf), axis=-1).astype(value.dtype)
        return self.output(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(b, t, -1))


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `deepseek_v3` describes."""
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    heads, activation = LatentHeads.read(settings), read_activation(settings)
    rope = dataclasses.replace(
        read_rope(settings, heads.rotary, max_len), interleaved=settings.flag("rope_interleave", True)
    )
    bias = settings.flag("attention_bias", False)
    choice = Choice(
        experts=settings.size("n_routed_experts"),
        chosen=settings.size("num_experts_per_tok"),
        normalized=settings.flag("norm_topk_prob", True),
        scale=settings.positive("routed_scaling_factor", 1.0),
    )
    groups, kept = settings.size("n_group", 1), settings.size("topk_group", 1)
    if choice.experts % groups or kept > groups:
        raise settings.wrong("n_group", f"a divisor of {choice.experts} experts, at least topk_group={kept}", groups)

    def feed_forward(index: int) -> nnx.Module:
        if index < settings.count("first_k_dense_replace", 0):
            return GatedFeedForward(sizes.width, sizes.hidden, activation, rngs=rngs)
        hidden = settings.size("moe_intermediate_size")
        router = GroupedSigmoidRouter(sizes.width, choice, groups, kept, rngs=rngs)
        shared = settings.count("n_shared_experts", 0) * hidden or None
        return SparseFeedForward(sizes.width, hidden, router, activation, shared=shared, rngs=rngs)

    def block(index: int) -> Block:
        attention = LatentAttention(sizes.width, heads, rope, sizes.norm_epsilon, bias, rngs=rngs)
        return Block(norm(), attention, norm(), feed_forward(index))

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


_LATENT = {
    f"layers/*/attention/{ours}/{leaf}": f"model.layers.*.self_attn.{theirs}.{kind}"
    for ours, theirs in (
        ("query_down", "q_a_proj"),
        ("latent", "kv_a_proj_with_mqa"),
        ("key_value", "kv_b_proj"),
        ("output", "o_proj"),
    )
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
} | {
    "layers/*/attention/query/kernel": "model.layers.*.self_attn.q_proj.weight",
    "layers/*/attention/query_up/kernel": "model.layers.*.self_attn.q_b_proj.weight",
    "layers/*/attention/query_norm/scale": "model.layers.*.self_attn.q_a_layernorm.weight",
    "layers/*/attention/latent_norm/scale": "model.layers.*.self_attn.kv_a_layernorm.weight",
}
_ROUTED = {"layers/*/feed_forward/router/correction": "model.layers.*.mlp.gate.e_score_correction_bias"} | {
    f"layers/*/feed_forward/shared/{part}/kernel": f"model.layers.*.mlp.shared_experts.{part}_proj.weight"
    for part in ("gate", "up", "down")
}


def _resize(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    attention = "layers/0/attention"
    heads = shapes[f"{attention}/output/kernel"][0] // settings.size("v_head_dim")
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads}
    ranks = {"kv_lora_rank": f"{attention}/key_value/kernel", "q_lora_rank": f"{attention}/query_up/kernel"}
    sizes |= {key: shapes[name][0] for key, name in ranks.items() if name in shapes}
    return stream_size(shapes) | feed_forward_sizes(shapes) | count_experts(shapes, "n_routed_experts") | sizes


FAMILY = Family(
    "DeepseekV3ForCausalLM",
    build,
    DECODER | FEED_FORWARD | EXPERTS | _LATENT | _ROUTED,
    resize=_resize,
)
