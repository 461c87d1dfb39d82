"""GPT-2: learned positions, LayerNorm, one product for queries, keys and values, a plain feed-forward.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.models.family import Family
from xlathe.models.layers import Block, FeedForward, Heads, attend, linear
from xlathe.models.resize import square_sizes
from xlathe.models.settings import Settings
from xlathe.models.sizes import read_activation


class FusedAttention(nnx.Module):
    """One product makes queries, keys and values, in this order."""

    def __init__(self, width: int, heads: Heads, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.fused = linear(width, 3 * width, rngs, bias=True)
        self.output = linear(width, width, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        parts = (part.reshape(b, t, -1, self.heads.dim) for part in jnp.split(self.fused(x), 3, axis=-1))
        return self.output(attend(*parts, scale=self.heads.scale).reshape(b, t, -1))


class GPT2(nnx.Module):
    """`model(tokens)`: int32 [b, t] to float32 logits [b, t, vocab]; the embedding is the output layer too."""

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs) -> None:
        width, vocab = settings.size("n_embd"), settings.size("vocab_size")
        norm = functools.partial(nnx.LayerNorm, width, epsilon=settings.positive("layer_norm_epsilon", 1e-5), rngs=rngs)
        self.embedding = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Embed(settings.size("n_positions"), width, rngs=rngs)
        self.layers = nnx.List([_block(settings, i, norm, rngs) for i in range(settings.size("n_layer"))])
        self.norm = norm()
        self.head = None if settings.flag("tie_word_embeddings", True) else linear(width, vocab, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return (self.embedding.attend(x) if self.head is None else self.head(x)).astype(jnp.float32)


def _block(settings: Settings, index: int, norm: functools.partial[nnx.LayerNorm], rngs: nnx.Rngs) -> Block:
    width = settings.size("n_embd")
    activation = read_activation(settings, "activation_function", "gelu_new")
    hidden = settings.size("n_inner", 4 * width)
    attention = FusedAttention(width, _heads(settings, index), rngs=rngs)
    return Block(norm(), attention, norm(), FeedForward(width, hidden, activation, rngs=rngs))


def _heads(settings: Settings, index: int) -> Heads:
    count, width = settings.size("n_head"), settings.size("n_embd")
    if width % count:
        raise settings.wrong("n_head", f"a divisor of n_embd, {width}", count)
    dim = width // count
    scale = dim**-0.5 if settings.flag("scale_attn_weights", True) else 1.0
    depth = index + 1 if settings.flag("scale_attn_by_inverse_layer_idx", False) else 1
    return Heads(count, count, dim, scale / depth)


def build(settings: Settings, max_len: int, rngs: nnx.Rngs) -> GPT2:
    """Builds the model that a `config.json` of the type `gpt2` describes."""
    settings.refuse("add_cross_attention", unless=False, why="only decoders without an encoder are built")
    return GPT2(settings, rngs=rngs)


FAMILY = Family(
    "GPT2LMHeadModel",
    build,
    {
        "embedding/embedding": "transformer.wte.weight",
        "positions/embedding": "transformer.wpe.weight",
        "norm/scale": "transformer.ln_f.weight",
        "norm/bias": "transformer.ln_f.bias",
        "head/kernel": "lm_head.weight",
    }
    | {
        f"layers/*/{ours}/{leaf}": f"transformer.h.*.{theirs}.{kind}"
        for ours, theirs, leaves in (
            ("attention_norm", "ln_1", ("scale", "bias")),
            ("attention/fused", "attn.c_attn", ("kernel", "bias")),
            ("attention/output", "attn.c_proj", ("kernel", "bias")),
            ("feed_forward_norm", "ln_2", ("scale", "bias")),
            ("feed_forward/up", "mlp.c_fc", ("kernel", "bias")),
            ("feed_forward/down", "mlp.c_proj", ("kernel", "bias")),
        )
        for leaf, kind in zip(leaves, ("weight", "bias"), strict=True)
    },
    linear=False,
    resize=lambda shapes, settings: square_sizes(shapes, settings, "n_embd", "n_head")
    | {"n_inner": shapes["layers/0/feed_forward/up/kernel"][1]},
    indexed=("scale_attn_by_inverse_layer_idx",),
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)
