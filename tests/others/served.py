"""What decoders that others wrote have to come through: traced, fused, quantized, cached, compiled and served."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.passes.decoding import decode, difference, in_one_batch
from xlathe import passes

VOCAB, MAX_LEN, LAYERS = 61, 32, 2
# tokens of texts 0, 1 and 2 that each call reads; lengths are 12, 9 and 5
SCHEDULE = [{0: 5, 1: 3}, {0: 1, 1: 1, 2: 1}, {2: 4}, {0: 1}, {0: 3, 1: 5}, {0: 1}, {0: 1}]

type Forward = Callable[[Any, jax.Array], jax.Array]  # (weights, tokens [b, t]) -> logits [b, t, VOCAB]


def optional(name: str) -> ModuleType:
    """Imports a package, or skips the tests of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: make test-others", exc_type=ImportError)


def peaked[Tree](weights: Tree, seed: int = 0) -> Tree:
    """Random weights that make attention peaked; scales and biases only move a little from where they start."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        start, spread = (0.0, 0.3) if leaf.ndim > 1 else (leaf, 0.1)
        return jnp.asarray(start + rng.normal(0.0, spread, leaf.shape), jnp.float32)

    return jax.tree.map(draw, weights)


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n) for n in (12, 9, 5)]


def check_step(forward: Forward, weights: Any) -> xl.Graph:
    """Every attention is matched, and any chunking and mixture of rows equals the forward; returns the fused graph."""
    fused = passes.FuseAttention()(passes.Canonicalize()(xl.trace(forward, weights, max_len=MAX_LEN)))
    assert fused.history[-1].hits == {"attention": LAYERS}, fused.history[-1].misses
    expected = jax.jit(forward)(weights, in_one_batch(texts()))
    other = in_one_batch(texts())
    other[:, 0] += 1
    assert difference(jax.jit(forward)(weights, other % VOCAB)[:, 1:], expected[:, 1:]) > 1e-3  # context counts
    found = decode(passes.KVCache()(fused), texts(), SCHEDULE, rows=[2, 0, 3], slots=16)
    for logits, whole in zip(found, expected, strict=True):
        assert difference(logits, whole[: len(logits)]) <= 1e-5
    return fused


def check_served(forward: Forward, weights: Any, fused: xl.Graph) -> None:
    """The compiled program's greedy text is that of an argmax over full forwards."""
    prompts = [text[:4].tolist() for text in texts()[:2]]
    program = xl.compile(passes.KVCache()(fused), target="cpu", max_batch=2, max_len=16)
    served = program.generate(prompts, max_tokens=6)
    whole = jax.jit(forward)
    for prompt, result in zip(prompts, served, strict=True):
        ids = np.zeros((1, 16), np.int32)
        ids[0, :4] = prompt
        for i in range(4, 10):
            ids[0, i] = np.argmax(np.asarray(whole(weights, ids))[0, i - 1])
        assert list(result.tokens) == ids[0, 4:10].tolist()


def check_small(forward: Forward, weights: Any, fused: xl.Graph) -> None:
    """Weights of 8 bits in pages of 8-bit keys and values: every matrix is quantized, and the program decodes."""
    quantized = passes.Quantize("int8")(fused)
    assert quantized.history[-1].hits["weight"] >= 4 * LAYERS
    expected = jax.jit(forward)(weights, in_one_batch(texts()))
    assert difference(quantized(in_one_batch(texts())), expected) < 0.2
    small = passes.CacheLayout("paged", page=8, dtype="int8")(passes.KVCache()(quantized))
    (result,) = xl.compile(small, target="cpu", max_batch=1, max_len=16).generate([[1, 2, 3]], max_tokens=4)
    assert len(result.tokens) == 4
