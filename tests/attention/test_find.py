"""What attention may look like, and what only looks like it: one attention written in many ways.

Each author gets scores [b, h, q, k] (scaled, unmasked), values [b, h, k, d] and the length, and returns [b, h, q, d].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import xlathe
from tests.passes.decoding import difference
from xlathe.graph import Graph
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention

Author = Callable[[Array, Array, int], Array]


def causal(t: int, window: int | None = None) -> Array:
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def masked(scores: Array, t: int) -> Array:
    return jnp.where(causal(t), scores, -1e30)


def normalized(exponentials: Array) -> Array:
    return exponentials / exponentials.sum(-1, keepdims=True)


def softmax_of(change: Callable[[Array, int], Array]) -> Author:
    return lambda scores, values, t: jax.nn.softmax(change(scores, t)) @ values


def masked_then(change: Callable[[Array, int], Array]) -> Author:
    return lambda scores, values, t: change(masked(scores, t), t) @ values


def masked_twice(scores: Array, values: Array, t: int) -> Array:
    seen = causal(t)
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30)), 0.0) @ values


SOUND: dict[str, Author] = {
    "a shift before the mask": softmax_of(lambda s, t: masked(s - s.max(-1, keepdims=True), t)),
    "a number added": softmax_of(lambda s, t: masked(s + 3.0, t)),
    "a row's own number added": softmax_of(lambda s, t: masked(s, t) + jnp.arange(t)[:, None]),
    "bias and mask in one sum": softmax_of(lambda s, t: s + (jnp.cos(jnp.arange(t)) + jnp.where(causal(t), 0.0, -1e9))),
    "the mask subtracted": softmax_of(lambda s, t: s - jnp.where(causal(t), 0.0, 1e9)),
    "a mask scaled but still deep": softmax_of(lambda s, t: jnp.where(causal(t), s, -1e9) * 0.5),
    "masked twice by the same": masked_twice,
    "a shift that is no maximum": masked_then(lambda s, t: normalized(jnp.exp(s - s[..., :1].sum(-1, keepdims=True)))),
    "weights above zero": masked_then(lambda s, t: normalized(jnp.exp(s) * jnp.exp(-0.1 * jnp.arange(t)))),
    "scores as a bias of the keys": softmax_of(lambda s, t: masked(s - s.max(-2, keepdims=True), t)),
    "a shift that differs by key": masked_then(
        lambda s, t: normalized(jnp.exp(s - jnp.maximum(s.max(-1, keepdims=True), 0.3 * jnp.arange(t))))
    ),
    "log space": masked_then(lambda s, t: jnp.exp(s - jax.nn.logsumexp(s, -1, keepdims=True))),
    "log softmax": masked_then(lambda s, t: jnp.exp(jax.nn.log_softmax(s))),
    "log of the plain sum": masked_then(lambda s, t: jnp.exp(s - jnp.log(jnp.exp(s).sum(-1, keepdims=True)))),
}

LOOK_ALIKES: dict[str, tuple[str, Author]] = {
    "normalized too much": ("", masked_then(lambda s, t: jnp.exp(s - (jax.nn.logsumexp(s, -1, keepdims=True) + 1.0)))),
    "the shift forgotten": (
        "",
        masked_then(
            lambda s, t: jnp.exp(s - jnp.log(jnp.exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True)))
        ),
    ),
    "the sum spread over keys": (
        "divided by a sum that is not theirs",
        masked_then(lambda s, t: jnp.exp(s) / jnp.exp(s).sum(-1)[:, :, None, :]),
    ),
    "a window over the probabilities": (
        "masked by something that the scores are not masked by",
        masked_then(lambda s, t: jnp.where(causal(t, 3), jax.nn.softmax(s), 0.0)),
    ),
    "masked after the softmax": (
        "masked by something that the scores are not masked by",
        lambda s, v, t: jnp.where(causal(t), jax.nn.softmax(s), 0.0) @ v,
    ),
    "the numerator masked alone": (
        "divided by a sum that is not theirs",
        lambda s, v, t: (jnp.where(causal(t), jnp.exp(s), 0.0) / jnp.exp(s).sum(-1, keepdims=True)) @ v,
    ),
    "the sum masked alone": (
        "a mask acts on the sum of the exponentials alone",
        lambda s, v, t: (jnp.exp(s) / jnp.where(causal(t), jnp.exp(s), 0.0).sum(-1, keepdims=True)) @ v,
    ),
    "another mask in the sum": (
        "divided by a sum that is not theirs",
        lambda s, v, t: (
            jnp.where(causal(t, 3), jnp.exp(s), 0.0) / jnp.where(causal(t), jnp.exp(s), 0.0).sum(-1, keepdims=True)
        )
        @ v,
    ),
    "scaled after the mask": (
        "a select on the scores without a large negative fill",
        softmax_of(lambda s, t: jnp.where(causal(t), s, -1e4) * 1e-4),
    ),
    "negated after the mask": ("", softmax_of(lambda s, t: -jnp.where(causal(t), s, -1e9))),
    "a shallow mask beside a bias": (
        "mask of -20000 beside a bias",
        softmax_of(lambda s, t: jnp.where(causal(t), s, -2e4) + 3e4 * jnp.sin(jnp.arange(t))),
    ),
    "a number inside the soft-cap": (
        "add on the scores before the soft-cap",
        softmax_of(lambda s, t: masked(jnp.tanh((s + 3.0) / 2.0) * 2.0, t)),
    ),
    "a soft-cap of negative height": (
        "tanh between",
        softmax_of(lambda s, t: masked(jnp.tanh(s) * -2.0, t)),
    ),
    "scores rounded to integers": (
        "a cast from int32 to float32",
        softmax_of(lambda s, t: masked((4 * s).astype(jnp.int32).astype(jnp.float32), t)),
    ),
    "scores rounded to bfloat16": (
        "a cast from float32 to bfloat16",
        softmax_of(lambda s, t: masked(s.astype(jnp.bfloat16).astype(jnp.float32), t)),
    ),
    "scores of less precision": (
        "reduce_precision between the product and the softmax",
        softmax_of(lambda s, t: masked(jax.lax.reduce_precision(s, 8, 7), t)),
    ),
    "probabilities rounded and back": (
        "a cast from bfloat16 to float32 after the softmax",
        masked_then(lambda s, t: jax.nn.softmax(s).astype(jnp.bfloat16).astype(jnp.float32)),
    ),
    "probabilities as integers": (
        "a cast from float32 to int32 after the softmax",
        masked_then(lambda s, t: (jax.nn.softmax(s)).astype(jnp.int32).astype(jnp.float32)),
    ),
    "weights below zero": (
        "multiplied by something that may be negative",
        masked_then(lambda s, t: normalized(jnp.exp(s) * jnp.where(jnp.arange(t) % 2 == 0, 1.0, -0.3))),
    ),
    "scores times zero": ("mul of the scores by 0.0", softmax_of(lambda s, t: masked(s * 0.0, t))),
    "values of one head": (
        "share an axis that the values have not",
        lambda s, v, t: jnp.einsum("bhqk,bkd->bhqd", jax.nn.softmax(masked(s, t)), v[:, 0]),
    ),
    "over the heads of a token": (
        "an axis that is not the tokens",
        lambda s, v, t: jnp.einsum("bqhg,bgqd->bhqd", jax.nn.softmax(jnp.einsum("bhqd,bgqd->bqhg", v, v)), v),
    ),
}


def graph_of(author: Author) -> tuple[Graph, Callable[[Array], Array]]:
    """A decoder of one layer with two heads of four around the author's attention, canonicalized."""
    rng = np.random.default_rng(5)
    shapes = {"embed": (11, 8), "query": (8, 8), "key": (8, 8), "value": (8, 8)}
    params = {name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}

    def model(params: dict[str, Array], tokens: Array) -> Array:
        x = params["embed"][tokens]
        b, t, _ = x.shape
        q, k, v = ((x @ params[n]).reshape(b, t, 2, 4).swapaxes(1, 2) for n in ("query", "key", "value"))
        out = author(q @ k.mT / 2.0, v, t)
        return (x + out.swapaxes(1, 2).reshape(b, t, 8)) @ params["embed"].T

    return Canonicalize()(xlathe.trace(model, params=params, max_len=16)), lambda tokens: model(params, tokens)


@pytest.mark.parametrize("name", SOUND)
def test_found(name: str) -> None:
    graph, model = graph_of(SOUND[name])
    fused = FuseAttention()(graph)
    assert fused.history[-1].hits == {"attention": 1}, fused.history[-1].misses
    tokens = np.random.default_rng(6).integers(0, 11, (2, 9))
    assert difference(fused(tokens), model(tokens)) <= 1e-5


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_not_found(name: str) -> None:
    reason, author = LOOK_ALIKES[name]
    graph, _ = graph_of(author)
    fused = FuseAttention()(graph)
    assert fused.history[-1].hits == {"attention": 0}
    tokens = np.random.default_rng(6).integers(0, 11, (2, 9))
    np.testing.assert_array_equal(fused(tokens), graph(tokens))
    misses = fused.history[-1].misses
    assert not reason or any(reason in miss and "test_find.py:" in miss for miss in misses), misses

