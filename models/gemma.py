"""What Gemma 2 and 3 share: norms around each half of a layer, scaled embeddings, and scales stored less one."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlathe.models.layers import Attention, Decoder, GatedFeedForward, Heads
from xlathe.models.resize import Change, Shapes
from xlathe.models.settings import Settings
from xlathe.models.sizes import Sizes, read_activation


class OffsetNorm(nnx.Module):
    """RMSNorm over the last axis, times 1 + `scale`, in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (normal * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class SandwichBlock(nnx.Module):
    """One layer: each half is normalized before and after, then added to the residual stream."""

    def __init__(self, norm: Callable[[], nnx.Module], attention: Attention, feed_forward: GatedFeedForward) -> None:
        self.attention_norm, self.attention, self.attention_after = norm(), attention, norm()
        self.feed_forward_norm, self.feed_forward, self.feed_forward_after = norm(), feed_forward, norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention_after(self.attention(self.attention_norm(x)))
        return x + self.feed_forward_after(self.feed_forward(self.feed_forward_norm(x)))


NORMS = {
    f"layers/*/{ours}/scale": f"model.layers.*.{theirs}.weight"
    for ours, theirs in (
        ("attention_norm", "input_layernorm"),
        ("attention_after", "post_attention_layernorm"),
        ("feed_forward_norm", "pre_feedforward_layernorm"),
        ("feed_forward_after", "post_feedforward_layernorm"),
    )
}


def read_sizes(settings: Settings) -> Sizes:
    settings.refuse("use_bidirectional_attention", unless=False, why="only causal attention is built")
    return Sizes.read(settings, tied=True)


def read_heads(settings: Settings, sizes: Sizes) -> Heads:
    """Scores are multiplied by 1 / sqrt(query_pre_attn_scalar), whatever the size of a head."""
    scale = settings.positive("query_pre_attn_scalar", 256.0) ** -0.5
    return Heads(sizes.heads.queries, sizes.heads.keys_values, sizes.heads.dim, scale)


def make_norm(sizes: Sizes, width: int | None = None) -> Callable[[], OffsetNorm]:
    return functools.partial(OffsetNorm, width or sizes.width, sizes.norm_epsilon)


def feed_forward(settings: Settings, sizes: Sizes, rngs: nnx.Rngs) -> GatedFeedForward:
    activation = read_activation(settings, "hidden_activation", "gelu_pytorch_tanh")
    return GatedFeedForward(sizes.width, sizes.hidden, activation, rngs=rngs)


def keep_embedding_scale(shapes: Shapes, settings: Settings) -> dict[str, Change]:
    """How weights of a narrower stream make good for embeddings that are multiplied by sqrt(hidden_size).

    A forward that is built from the new size multiplies by another number: embeddings take up the ratio, and where
    they are the output layer too the last norm gives it back.
    """
    widths = settings.size("hidden_size"), shapes["embedding/embedding"][1]

    def ratio(dtype: np.dtype) -> float:
        before, after = (float(np.asarray(math.sqrt(width), dtype)) for width in widths)
        return before / after

    def scale(embedding: np.ndarray) -> np.ndarray:
        return (embedding.astype(np.float32) * ratio(embedding.dtype)).astype(embedding.dtype)

    def unscale(offset: np.ndarray) -> np.ndarray:
        return ((1 + offset.astype(np.float32)) / ratio(offset.dtype) - 1).astype(offset.dtype)

    if widths[0] == widths[1]:
        return {}
    return {"embedding/embedding": scale} | ({} if "head/kernel" in shapes else {"norm/scale": unscale})


def decoder(settings: Settings, sizes: Sizes, block: Callable[[int], nnx.Module], rngs: nnx.Rngs) -> Decoder:
    """Puts scaled embeddings before the layers, and logits that may be soft-capped after them."""
    return Decoder(
        sizes.vocab,
        sizes.width,
        sizes.layers,
        block,
        make_norm(sizes),
        tied=sizes.tied,
        scaled=True,
        soft_cap=settings.optional_number("final_logit_softcapping"),
        rngs=rngs,
    )
