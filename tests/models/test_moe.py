"""Routers and sparse feed-forwards beside NumPy, token by token, as their papers write them."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlathe.models.moe import Choice, GroupedSigmoidRouter, SoftmaxRouter, SparseFeedForward

WIDTH, EXPERTS = 12, 8
X = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)
FIXTURES = Path(os.environ.get("XLATHE_HF_FIXTURES", "fixtures/hf"))  # as transformers saved and computed them


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("normalized", [True, False])
def test_softmax_router(normalized: bool) -> None:
    router = SoftmaxRouter(WIDTH, Choice(EXPERTS, 3, normalized), rngs=nnx.Rngs(0))
    weights, experts = map(np.asarray, router(jnp.asarray(X[0])))
    for token, found, chosen in zip(X[0], weights, experts, strict=True):
        logits = token @ np.asarray(router.gate.kernel)
        best = np.argsort(-logits)[:3]
        np.testing.assert_array_equal(chosen, best)
        expected = softmax(logits[best]) if normalized else softmax(logits)[best]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_grouped_router() -> None:
    """Of 4 groups of 2 the two with the best sums are chosen from; the correction chooses and does not weigh."""
    router = GroupedSigmoidRouter(WIDTH, Choice(EXPERTS, 3, scale=2.5), 4, 2, rngs=nnx.Rngs(1))
    correction = np.random.default_rng(2).normal(size=EXPERTS).astype(np.float32)
    router.correction[...] = jnp.asarray(correction)
    weights, experts = map(np.asarray, router(jnp.asarray(X[0])))
    for token, found, chosen in zip(X[0], weights, experts, strict=True):
        scores = 1 / (1 + np.exp(-(token @ np.asarray(router.gate.kernel))))
        groups = np.argsort(-(scores + correction).reshape(4, 2).sum(axis=1))[:2]
        allowed = [e for e in range(EXPERTS) if e // 2 in groups]
        best = sorted(allowed, key=lambda e: -(scores + correction)[e])[:3]
        np.testing.assert_array_equal(chosen, best)
        np.testing.assert_allclose(found, 2.5 * scores[best] / scores[best].sum(), rtol=1e-5)


@pytest.mark.parametrize("shared", [None, 6])
def test_a_token_gets_the_weighted_sum_of_its_experts(shared: int | None) -> None:
    router = SoftmaxRouter(WIDTH, Choice(EXPERTS, 2), rngs=nnx.Rngs(3))
    layer = SparseFeedForward(WIDTH, 10, router, shared=shared, rngs=nnx.Rngs(4))
    found = np.asarray(layer(jnp.asarray(X)))
    weights, experts = (np.asarray(a) for a in router(jnp.asarray(X.reshape(-1, WIDTH))))
    for i, token in enumerate(X.reshape(-1, WIDTH)):
        parts = [w * np.asarray(layer.experts[int(e)](token)) for w, e in zip(weights[i], experts[i], strict=True)]
        expected = sum(parts) + (0 if layer.shared is None else np.asarray(layer.shared(token)))
        np.testing.assert_allclose(found.reshape(-1, WIDTH)[i], expected, rtol=1e-4, atol=1e-5)
