"""Phi-3: a Llama whose projections are fused, queries with keys and values, and gate with up.

https://arxiv.org/abs/2404.14219
"""

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.models.family import DECODER, Family
from xlathe.models.layers import Activation, Block, Decoder, Heads, attend, linear
from xlathe.models.resize import resize_fused
from xlathe.models.rope import Rope, read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


class FusedAttention(nnx.Module):
    """One product makes queries, keys and values, in this order."""

    def __init__(self, width: int, heads: Heads, rope: Rope, window: int | None, *, rngs: nnx.Rngs) -> None:
        self.heads, self.rope, self.window = heads, rope, window
        self.fused = linear(width, (heads.queries + 2 * heads.keys_values) * heads.dim, rngs)
        self.output = linear(heads.queries * heads.dim, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        fused = self.fused(x).reshape(b, t, -1, self.heads.dim)
        ends = [self.heads.queries, self.heads.queries + self.heads.keys_values]
        query, key, value = jnp.split(fused, ends, axis=2)
        mixed = attend(self.rope(query), self.rope(key), value, window=self.window)
        return self.output(mixed.reshape(b, t, -1))


class FusedFeedForward(nnx.Module):
    """One product makes gate and up, in this order."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.fused = linear(width, 2 * hidden, rngs)
        self.down = linear(hidden, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.fused(x), 2, axis=-1)
        return self.down(up * self.activation(gate))


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `phi3` describes."""
    settings = settings.with_defaults(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    sizes = Sizes.read(settings)
    norm = sizes.rms_norm(rngs)
    rope, activation = read_rope(settings, sizes.heads.dim, max_len), read_activation(settings)
    window = settings.optional_size("sliding_window")

    def block(index: int) -> Block:
        attention = FusedAttention(sizes.width, sizes.heads, rope, window, rngs=rngs)
        return Block(norm(), attention, norm(), FusedFeedForward(sizes.width, sizes.hidden, activation, rngs=rngs))

    return Decoder(sizes.vocab, sizes.width, sizes.layers, block, norm, tied=sizes.tied, rngs=rngs)


FAMILY = Family(
    "Phi3ForCausalLM",
    build,
    DECODER
    | {
        "layers/*/attention/fused/kernel": "model.layers.*.self_attn.qkv_proj.weight",
        "layers/*/attention/output/kernel": "model.layers.*.self_attn.o_proj.weight",
        "layers/*/feed_forward/fused/kernel": "model.layers.*.mlp.gate_up_proj.weight",
        "layers/*/feed_forward/down/kernel": "model.layers.*.mlp.down_proj.weight",
    },
    resize=resize_fused,
)
