"""Queries, keys and values are turned: the function stays, and what is cached has no outlier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import xlathe
from tests.passes.decoding import decode, fused
from tests.variants import DECODERS
from xlathe.graph import Graph
from xlathe.passes import CacheLayout, Canonicalize, FuseAttention, KVCache, RotateHeads
from xlathe.passes.rotate_heads import turn

VARIANTS = {variant.name: variant for variant in DECODERS}
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 12))


@pytest.mark.parametrize(("size", "block"), [(8, 8), (12, 4), (7, 1), (96, 32)])
def test_turn_is_the_hadamard_matrix_of_blocks(size, block):
    """Expected: SciPy's matrix over the root of its size; applied twice, what was there."""
    x = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    matrix = np.kron(np.eye(size // block), scipy.linalg.hadamard(block)) / block**0.5
    np.testing.assert_allclose(turn(x), x @ matrix, atol=1e-6)
    np.testing.assert_allclose(turn(turn(x)), x, atol=1e-6)


@pytest.mark.parametrize("name", ["rope_half", "shared_cache"])
def test_the_step_still_equals_the_forward(name):
    graph = fused(VARIANTS[name])
    turned = RotateHeads()(graph)
    texts = [np.asarray(row) % VARIANTS[name].vocab for row in TOKENS]
    expected = graph(np.stack(texts))
    np.testing.assert_allclose(turned(np.stack(texts)), expected, atol=2e-5)
    step = KVCache()(turned)
    assert len(step.names("state")) == len(KVCache()(graph).names("state"))
    found = decode(step, texts, [{0: 5, 1: 3}, {0: 1}, {0: 3, 1: 5}, {0: 3, 1: 4}], [2, 0], 16)
    np.testing.assert_allclose(found, expected, atol=2e-5)


HEADS, HEAD, WIDTH, LENGTH = 2, 32, 64, 16


def loud_decoder() -> Graph:
    """A layer of attention in which feature 3 of each key is 100 times as large, and that of each query as small."""
    random = np.random.default_rng(1)
    loud = np.ones(WIDTH, np.float32)
    loud[3::HEAD] = 100
    params = {name: random.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for name in ("q", "k", "v", "o")}
    params |= {"embed": random.normal(size=(17, WIDTH)).astype(np.float32), "k": params["k"] * loud}
    params["q"] = 3 * params["q"] / loud

    def forward(p, tokens):
        x = p["embed"][tokens]
        q, k, v = (jnp.reshape(x @ p[name], (*x.shape[:2], HEADS, HEAD)) for name in ("q", "k", "v"))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5
        earlier = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        probs = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", probs, v).reshape(x.shape)
        return (x + mixed @ p["o"]) @ p["embed"].T

    return FuseAttention()(Canonicalize()(xlathe.trace(forward, params=params, max_len=LENGTH)))


def test_a_cache_of_8_bits_keeps_more():
    """Expected: with the loud feature spread over its head, codes of 8 bits err less than a fifth as much."""
    graph = loud_decoder()
    texts = [np.asarray(row) for row in TOKENS]
    expected = graph(np.stack(texts))

    def error(made: Graph) -> float:
        step = CacheLayout(dtype="int8")(KVCache()(made))
        found = np.stack(decode(step, texts, [{0: 6, 1: 2}, {0: 6, 1: 2}, {1: 8}], [0, 1], LENGTH))
        return float(np.abs(found - expected).max())

    assert error(RotateHeads()(graph)) < error(graph) / 5
