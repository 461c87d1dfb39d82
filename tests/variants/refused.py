"""Look-alikes without a derived KV cache: most let a token depend on what follows it, a few lack a state rule."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.variants.base import (
    HEAD_DIM,
    VOCAB,
    WIDTH,
    Attend,
    Forward,
    Params,
    Variant,
    decoder,
    decoder_params,
    merged,
    mlp,
    projected,
    rms_norm,
)


def scores_and_values(layer: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k, v = projected(layer, x)
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5, v


def weighted(layer: Params, weights: jax.Array, v: jax.Array) -> jax.Array:
    return merged(layer, jnp.einsum("bhqk,bkhd->bqhd", weights, v))


def causal(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    mask = jnp.tri(x.shape[1], dtype=bool)
    return weighted(layer, jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), v)


def softmax_over_queries(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-2)  # refused
    return weighted(layer, weights, v)


def no_mask(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    weights = jax.nn.softmax(scores, axis=-1)  # refused
    return weighted(layer, weights, v)


def one_token_ahead(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool), k=1)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)  # refused
    return weighted(layer, weights, v)


def mixing(mix: Attend) -> Forward:
    """A sound decoder with one more residual branch, `mix`, before its attention."""
    return decoder(lambda layer, x: causal(layer, x + mix(layer, x)))


def token_mean(layer: Params, x: jax.Array) -> jax.Array:
    return x - x.mean(axis=1, keepdims=True)  # refused


def shift_from_future(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))  # refused


def sort_tokens(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.sort(x, axis=1)  # refused


def reverse_tokens(layer: Params, x: jax.Array) -> jax.Array:
    return 0.5 * jnp.flip(x, axis=1)  # refused


def cumulative_sum(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.cumsum(x, axis=1)  # refused


def scaled_by_length(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    t = x.shape[1]
    scores = scores * jnp.log(t + 1)  # refused
    return weighted(layer, jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf), axis=-1), v)


class BatchNormDecoder(nnx.Module):
    """Normalizes features over batch and tokens, as in training."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, embedding_init=jax.nn.initializers.normal(1.0), rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.params = nnx.data(jax.tree.map(nnx.Param, decoder_params(90)["layers"][0]))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        layer = jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Param))
        x = self.embed(tokens)
        x = self.norm(x)  # refused
        x = x + causal(layer, rms_norm(x, layer["norm1"]))
        return self.head(x + mlp(layer, x))


def refused(author: Attend, forward: Forward, reason: str, causal: bool = False, **options: bool) -> Variant:
    build = lambda: (forward, decoder_params(80))  # noqa: E731
    return Variant(
        author.__name__, build, layers=0, reason=reason, author=author, causal=causal, **options
    )


REFUSED = (
    refused(softmax_over_queries, decoder(softmax_over_queries), r"softmax|reduce_max|reduce_sum|exp|div"),
    refused(no_mask, decoder(no_mask), r"(?i)causal|mask|later|future"),
    refused(one_token_ahead, decoder(one_token_ahead), r"(?i)causal|mask|later|future"),
    refused(token_mean, mixing(token_mean), r"reduce_sum|mean"),
    refused(shift_from_future, mixing(shift_from_future), r"pad|slice|concatenate|shift"),
    refused(sort_tokens, mixing(sort_tokens), r"sort"),
    refused(reverse_tokens, mixing(reverse_tokens), r"rev|flip"),
    refused(cumulative_sum, mixing(cumulative_sum), r"cumsum", causal=True),
    refused(scaled_by_length, decoder(scaled_by_length), r"length|dim_as_value|size"),
    Variant(
        "batch_norm",
        lambda: BatchNormDecoder(nnx.Rngs(3)),
        layers=0,
        reason=r"reduce_sum|mean|norm",
        author=BatchNormDecoder,
        causal=False,
    ),
)
