"""Before: a product with a stack of weights. Expected: one input that is the stack, of the same numbers."""

import jax.numpy as jnp
import numpy as np

from tests.graphs import graph_of
from xlathe.stacks import stack_weights

RNG = np.random.default_rng(0)
WEIGHTS = {"embed": RNG.normal(size=(11, 8)).astype(np.float32), "head": RNG.normal(size=(8, 11)).astype(np.float32)}
PARTS = {f"parts/{i}/kernel": RNG.normal(size=(8, 8)).astype(np.float32) for i in range(3)}
TOKENS = np.array([[1, 2, 3]])


def model(p: dict, tokens: jnp.ndarray) -> jnp.ndarray:
    x = jnp.einsum("btd,edf->btf", p["embed"][tokens], jnp.stack([p[name] for name in PARTS]))
    return x @ p["head"]


def test_before_and_after() -> None:
    graph = graph_of(model, **WEIGHTS, **PARTS)
    stacked = stack_weights(graph)
    assert set(stacked.names("weight")) == {"embed", "head", "parts/*/kernel"}
    np.testing.assert_array_equal(stacked.weights["parts/*/kernel"], np.stack(list(PARTS.values())))
    np.testing.assert_array_equal(stacked(TOKENS), graph(TOKENS))
    assert {o.name: o.shape for o in stacked.origins} == {o.name: o.shape for o in graph.origins}


def test_a_weight_with_another_use_stays() -> None:
    graph = graph_of(lambda p, ids: model(p, ids) + (p["parts/1/kernel"] @ p["head"])[0], **WEIGHTS, **PARTS)
    assert stack_weights(graph) is graph
