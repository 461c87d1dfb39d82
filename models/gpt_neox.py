"""GPT-NeoX (Pythia): attention and feed-forward side by side, a part of each head rotated. arXiv 2204.06745"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.models.family import Family
from xlathe.models.layers import Decoder, FeedForward, Heads, attend, linear
from xlathe.models.resize import square_sizes
from xlathe.models.rope import Rope, read_rope
from xlathe.models.settings import Settings
from xlathe.models.sizes import read_activation


class FusedAttention(nnx.Module):
    """One product makes, head by head, queries, keys and values."""

    def __init__(self, width: int, heads: Heads, rope: Rope, bias: bool, *, rngs: nnx.Rngs) -> None:
        self.heads, self.rope = heads, rope
        self.fused = linear(width, 3 * width, rngs, bias)
        self.output = linear(width, width, rngs, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        fused = self.fused(x).reshape(b, t, self.heads.queries, 3 * self.heads.dim)
        query, key, value = jnp.split(fused, 3, axis=-1)
        return self.output(attend(self.rope(query), self.rope(key), value).reshape(b, t, -1))


class NeoXBlock(nnx.Module):
    """One layer. parallel: both halves read the same input, rather than the second what the first added."""

    def __init__(
        self, norms: tuple[nnx.Module, nnx.Module], attention: nnx.Module, feed_forward: nnx.Module, parallel: bool
    ) -> None:
        self.parallel = parallel
        self.attention_norm, self.feed_forward_norm = norms
        self.attention, self.feed_forward = attention, feed_forward

    def __call__(self, x: jax.Array) -> jax.Array:
        after = x + self.attention(self.attention_norm(x))
        return after + self.feed_forward(self.feed_forward_norm(x if self.parallel else after))


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> Decoder:
    """Builds the model that a `config.json` of the type `gpt_neox` describes."""
    width, count = settings.size("hidden_size"), settings.size("num_attention_heads")
    heads = Heads(count, count, width // count)
    norm = functools.partial(nnx.LayerNorm, width, epsilon=settings.positive("layer_norm_eps", 1e-5), rngs=rngs)
    rope = _rope(settings, heads.dim, max_len)
    bias, parallel = settings.flag("attention_bias", True), settings.flag("use_parallel_residual", True)

    def block(index: int) -> NeoXBlock:
        attention = FusedAttention(width, heads, rope, bias, rngs=rngs)
        activation = read_activation(settings, default="gelu")
        feed_forward = FeedForward(width, settings.size("intermediate_size"), activation, rngs=rngs)
        return NeoXBlock((norm(), norm()), attention, feed_forward, parallel)

    tied = settings.flag("tie_word_embeddings", False)
    return Decoder(
        settings.size("vocab_size"), width, settings.size("num_hidden_layers"), block, norm, tied=tied, rngs=rngs
    )


def _rope(settings: Settings, dim: int, max_len: int) -> Rope:
    """Before version 5 of transformers the keys were called otherwise."""
    old = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    renamed = {new: settings.values[name] for name, new in old.items() if settings.has(name)}
    default = {"partial_rotary_factor": 0.25}
    return read_rope(Settings({**default, **renamed, **settings.values}, settings.where), dim, max_len)


FAMILY = Family(
    "GPTNeoXForCausalLM",
    build,
    {
        "embedding/embedding": "gpt_neox.embed_in.weight",
        "norm/scale": "gpt_neox.final_layer_norm.weight",
        "norm/bias": "gpt_neox.final_layer_norm.bias",
        "head/kernel": "embed_out.weight",
    }
    | {
        f"layers/*/{ours}/{leaf}": f"gpt_neox.layers.*.{theirs}.{kind}"
        for ours, theirs, leaves in (
            ("attention_norm", "input_layernorm", ("scale", "bias")),
            ("attention/fused", "attention.query_key_value", ("kernel", "bias")),
            ("attention/output", "attention.dense", ("kernel", "bias")),
            ("feed_forward_norm", "post_attention_layernorm", ("scale", "bias")),
            ("feed_forward/up", "mlp.dense_h_to_4h", ("kernel", "bias")),
            ("feed_forward/down", "mlp.dense_4h_to_h", ("kernel", "bias")),
        )
        for leaf, kind in zip(leaves, ("weight", "bias"), strict=True)
    },
    resize=lambda shapes, settings: square_sizes(shapes, settings, "hidden_size", "num_attention_heads")
    | {"intermediate_size": shapes["layers/0/feed_forward/up/kernel"][1]},
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
