"""Attention is found in every layer of every decoder of the zoo, and means what the author wrote."""

import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from tests.passes.decoding import difference, fused
from tests.variants import DECODERS, REFUSED, Variant, forward
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention


@pytest.mark.parametrize("variant", DECODERS, ids=str)
def test_matched_in_every_layer(variant: Variant) -> None:
    graph = fused(variant)
    assert graph.history[-1].hits == {"attention": variant.layers}
    assert sum(e.primitive.name == "xlathe.attention" for e in graph.jaxpr.eqns) == variant.layers
    tokens = np.random.default_rng(0).integers(0, variant.vocab, (3, 12), dtype=np.int32)
    assert difference(graph(tokens), forward(variant)(tokens)) <= variant.rtol


@pytest.mark.parametrize("name", ["softmax_over_queries", "masked_after_softmax", "scaled_by_length"])
def test_look_alikes_are_near_misses(name: str) -> None:
    (variant,) = (v for v in REFUSED if v.name == name)
    record = fused(variant).history[-1]
    assert record.hits == {"attention": 0}
    file, line = variant.refused_at
    assert any(f"{file}:{line}" in miss for miss in record.misses), record.misses


def test_key_value_heads_are_not_repeated() -> None:
    (variant,) = (v for v in DECODERS if v.name == "repeat_gqa")
    (first, *_) = (e for e in fused(variant).jaxpr.eqns if e.primitive.name == "xlathe.attention")
    q, k, v = (atom.aval.shape[2:] for atom in first.invars[:3])
    assert (q, k, v) == ((2, 2, 8), (2, 8), (2, 8))  # 2 key-value heads for 4 query heads of size 8


def test_before_and_after() -> None:
    """Before: product, mask, softmax, product. Expected: one operation; the scale and the mask are operands of it."""

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        scores = jnp.einsum("bqd,bkd->bqk", x @ params["q"], x) * 0.5
        positions = jnp.arange(tokens.shape[1])
        scores = jnp.where(positions[:, None] >= positions, scores, -jnp.inf)
        weights = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
        return jnp.einsum("bqk,bkd->bqd", weights, x) @ params["embed"].T

    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(7, 4)).astype(np.float32), "q": rng.normal(size=(4, 4)).astype(np.float32)}
    graph = FuseAttention()(Canonicalize()(xlathe.trace(model, params=params, max_len=16)))
    names = [e.primitive.name for e in graph.jaxpr.eqns]
    assert not {"exp", "div", "reduce_sum"} & set(names)
    (operation,) = (e for e in graph.jaxpr.eqns if e.primitive.name == "xlathe.attention")
    attributes = {k: operation.params[k] for k in ("scale", "softcap", "masked", "biased")}
    assert attributes == {"scale": 0.5, "softcap": None, "masked": True, "biased": False}
    tokens = rng.integers(0, 7, (2, 5))
    assert difference(graph(tokens), model(params, tokens)) <= 1e-6
