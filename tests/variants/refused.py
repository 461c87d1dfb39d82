"""Look-alikes without a KV cache: most let a token depend on what follows it, a few lack a state rule."""

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
    init_nnx,
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
    ones = jnp.ones((x.shape[1], x.shape[1]), dtype=bool)
    weights = jax.nn.softmax(jnp.where(jnp.tril(ones, k=1), scores, -jnp.inf), axis=-1)  # refused
    return weighted(layer, weights, v)


def centered_window(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    distance = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
    weights = jax.nn.softmax(jnp.where(jnp.abs(distance) < 3, scores, -jnp.inf), axis=-1)  # refused
    return weighted(layer, weights, v)


def prefix_sees_itself(layer: Params, x: jax.Array) -> jax.Array:
    """A prefix language model: the first eight tokens see one another."""
    scores, v = scores_and_values(layer, x)
    q, k = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])
    weights = jax.nn.softmax(jnp.where((k <= q) | (k < 8), scores, -jnp.inf), axis=-1)  # refused
    return weighted(layer, weights, v)


def masked_after_softmax(layer: Params, x: jax.Array) -> jax.Array:
    """Later keys get no weight, but their scores are in the denominator."""
    scores, v = scores_and_values(layer, x)
    weights = jax.nn.softmax(scores, axis=-1) * jnp.tri(x.shape[1])  # refused
    return weighted(layer, weights, v)


def window_of_half_the_length(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    t = x.shape[1]
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    weights = jax.nn.softmax(jnp.where((distance >= 0) & (distance <= t // 2), scores, -jnp.inf))  # refused
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


def shift_from_past(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))  # refused


def rolled(layer: Params, x: jax.Array) -> jax.Array:
    """Meant as a shift by one, but the first token gets the last."""
    return jnp.roll(x, 1, axis=1)  # refused


def causal_convolution(layer: Params, x: jax.Array) -> jax.Array:
    kernel = layer["up"][:4, None, :WIDTH]  # [taps, 1, d]
    layout = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, (1,), [(3, 0)], None, None, layout, WIDTH)  # refused


def recurrence(layer: Params, x: jax.Array) -> jax.Array:
    def step(state: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = 0.9 * state + y
        return state, state

    _, states = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))  # refused
    return states.swapaxes(0, 1)


def fourier(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.fft.fft(x, axis=1).real  # refused


def mixing_matrix(layer: Params, x: jax.Array) -> jax.Array:
    """A causal mixture whose weights depend on positions alone."""
    t = x.shape[1]
    weights = jnp.tril(jnp.sin(jnp.arange(t)[:, None] + 2 * jnp.arange(t)))
    return jnp.einsum("qk,bkd->bqd", weights, x)  # refused


def normalized_over_tokens(layer: Params, x: jax.Array) -> jax.Array:
    """Layer normalization over the wrong axes."""
    return jax.nn.standardize(x, axis=(1, 2))  # refused


def expert_choice(layer: Params, x: jax.Array) -> jax.Array:
    """An expert takes the token that fits it best."""
    best = jnp.argmax(x @ layer["up"][:, :4], axis=1)  # refused
    chosen = jax.nn.one_hot(best, x.shape[1], axis=1)  # [b, t, experts]
    return chosen @ layer["down"][:4]


def capacity(layer: Params, x: jax.Array) -> jax.Array:
    """An expert takes its first t / 4 tokens and drops the others."""
    expert = jax.nn.one_hot(jnp.argmax(x @ layer["up"][:, :4], axis=-1), 4)  # [b, t, experts]
    kept = jnp.cumsum(expert, axis=1) <= x.shape[1] // 4  # refused
    return (expert * kept) @ layer["down"][:4]


def packed_documents(layer: Params, x: jax.Array) -> jax.Array:
    """A token sees its own document, which a running count of delimiters numbers."""
    scores, v = scores_and_values(layer, x)
    document = jnp.cumsum(x[:, :, 0] > 1.0, axis=1)  # refused
    mask = (document[:, :, None] == document[:, None, :]) & jnp.tri(x.shape[1], dtype=bool)
    return weighted(layer, jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1), v)


def scaled_by_length(layer: Params, x: jax.Array) -> jax.Array:
    scores, v = scores_and_values(layer, x)
    t = x.shape[1]
    scores = scores * jnp.log(t + 1)  # refused
    return weighted(layer, jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf), axis=-1), v)


def positions_from_the_end(params: Params, tokens: jax.Array) -> jax.Array:
    distance = tokens.shape[1] - 1 - jnp.arange(tokens.shape[1])  # refused
    table = params["embed"][: tokens.shape[1]]
    return decoder(lambda layer, x: causal(layer, x + table[distance]))(params, tokens)


class BatchNormDecoder(nnx.Module):
    """Normalizes features over batch and tokens, as in training, and keeps no running average."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.params = nnx.data(jax.tree.map(nnx.Param, decoder_params(90)["layers"][0]))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        layer = jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Param))
        x = self.embed(tokens)
        x = jax.nn.standardize(x, axis=(0, 1))  # refused
        x = x + causal(layer, rms_norm(x, layer["norm1"]))
        return self.head(x + mlp(layer, x))


def refused(author: Attend, model: Forward, reason: str, **options: bool) -> Variant:
    def build() -> tuple[Forward, Params]:
        return model, decoder_params(80)

    return Variant(author.__name__, build, layers=0, reason=reason, author=author, **options)


def attends(author: Attend, reason: str, **options: bool) -> Variant:
    return refused(author, decoder(author), reason, **options)


def mixes(author: Attend, reason: str, **options: bool) -> Variant:
    return refused(author, mixing(author), reason, **options)


NOT_CAUSAL = r"(?i)causal|mask|later|future"

REFUSED = (
    attends(softmax_over_queries, r"(?i)softmax|causal|reduce_max|reduce_sum|exp|div", causal=False),
    attends(no_mask, NOT_CAUSAL, causal=False),
    attends(one_token_ahead, NOT_CAUSAL, causal=False),
    attends(centered_window, NOT_CAUSAL, causal=False),
    attends(prefix_sees_itself, NOT_CAUSAL, causal=False),
    attends(masked_after_softmax, NOT_CAUSAL + r"|softmax|mul|reduce_max|reduce_sum", causal=False),
    attends(window_of_half_the_length, r"(?i)length|size|dim_as_value|mask", causal=False),
    attends(scaled_by_length, r"(?i)length|size|dim_as_value", causal=False),
    attends(packed_documents, r"cumsum"),
    mixes(token_mean, r"reduce_sum|mean", causal=False),
    mixes(normalized_over_tokens, r"reduce_sum|mean", causal=False),
    mixes(shift_from_future, r"pad|slice|concatenate|shift", causal=False),
    mixes(shift_from_past, r"pad|slice|concatenate|shift"),
    mixes(rolled, r"roll|slice|concatenate|shift", causal=False),
    mixes(sort_tokens, r"sort", causal=False),
    mixes(reverse_tokens, r"rev|flip", causal=False),
    mixes(fourier, r"fft", causal=False),
    mixes(mixing_matrix, r"dot_general|contract"),
    mixes(causal_convolution, r"conv"),
    mixes(recurrence, r"scan|while"),
    mixes(cumulative_sum, r"cumsum"),
    mixes(expert_choice, r"argmax", causal=False),
    mixes(capacity, r"(?i)cumsum|length|size|dim_as_value", causal=False),
    refused(positions_from_the_end, positions_from_the_end, r"(?i)length|size|dim_as_value", causal=False),
    Variant(
        "batch_norm",
        lambda: init_nnx(BatchNormDecoder, 81),
        layers=0,
        reason=r"reduce_sum|mean|norm",
        author=BatchNormDecoder,
        causal=False,
    ),
)
