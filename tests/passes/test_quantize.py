"""Quantized weights: which are replaced, by what, and that the graph computes with exactly those values."""

import numpy as np
import pytest

from tests.passes.decoding import difference, fused, traced
from tests.variants import DECODERS, Variant
from xlathe.errors import OptionError
from xlathe.graph import Graph, Weights
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.quantize import Quantize
from xlathe.passes.quantize.rtn import RoundToNearest, quantize_channels

AUTHORINGS = ["llama", "gpt2", "linen_multi_head_attention", "fused_qkv", "tied_head", "nnx_scan"]


def variant(name: str) -> Variant:
    return next(v for v in DECODERS if v.name == name)


def rounded(original: Graph, quantized: Graph) -> Graph:
    """The original graph with each quantized weight replaced by codes * scale in its own layout."""
    arrays = dict(original.weights.stored)
    for recipe in quantized.weights.recipes:
        weight, made = arrays[recipe.source], recipe.make
        codes, scale = made(weight)
        order = (*made.free, *made.contracted)
        grouped = (codes * scale[:, None]).reshape([weight.shape[i] for i in order])
        arrays[recipe.source] = grouped.transpose(np.argsort(order)).astype(weight.dtype)
    return original.replace(weights=Weights(arrays))


@pytest.mark.parametrize("name", AUTHORINGS)
def test_equals_the_forward_with_rounded_weights(name: str) -> None:
    original = traced(variant(name))
    quantized = Quantize()(fused(variant(name)))
    tokens = np.random.default_rng(0).integers(0, variant(name).vocab, (2, 9))
    assert difference(quantized(tokens), rounded(original, quantized)(tokens)) <= 1e-5
    assert difference(quantized(tokens), original(tokens)) > 1e-4  # it is not the float graph


def test_before_and_after() -> None:
    """Before: weight [in, out] and a product. Expected: codes int8 [out, in], scale [out], and one operation."""
    graph = Quantize()(fused(variant("llama")))
    codes = [n for n in graph.names("weight") if n.endswith(".codes")]
    assert len(codes) == 15 == graph.history[-1].hits["weight"]
    assert all(graph.aval(n).dtype == "int8" and graph.aval(n).ndim == 2 for n in codes)
    assert all(graph.aval(n.replace(".codes", ".scale")).shape == graph.aval(n).shape[:1] for n in codes)
    assert not any(e.primitive.name == "dot_general" for e in graph.jaxpr.eqns)
    assert sum(e.primitive.name == "xlathe.quantized_dot" for e in graph.jaxpr.eqns) == 15


def test_round_to_nearest_by_its_definition() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    weight[:, 1, 2] = 0.0
    codes, scale = RoundToNearest(free=(2, 1), contracted=(0,))(weight)
    assert codes.shape == (12, 5) and codes.dtype == np.int8 and scale.dtype == np.float32
    channel = weight[:, 1, 3]  # row 3 * 3 + 1
    np.testing.assert_allclose(scale[10], np.abs(channel).max() / 127, rtol=1e-6)
    np.testing.assert_array_equal(codes[10], np.rint(channel.astype(np.float64) / scale[10]))
    assert not codes[7].any() and scale[7] == 1.0  # a channel of zeros stays zeros


def test_error_of_a_value_is_at_most_half_a_step() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    codes, scale = quantize_channels(weight)
    assert np.abs(codes * scale[:, None] - weight).max() <= scale.max() * 0.5001
    assert np.abs(codes).max() == 127


def test_rules_choose_weights_by_name() -> None:
    graph = Quantize(weights=r"layers/0/.*")(fused(variant("llama")))
    assert {n.split("/")[1] for n in graph.names("weight") if n.endswith(".codes")} == {"0"}


def test_also_after_the_step_was_derived() -> None:
    late = Quantize()(KVCache()(fused(variant("llama"))))
    early = KVCache()(Quantize()(fused(variant("llama"))))
    tokens = np.random.default_rng(2).integers(0, 61, (1, 7))
    assert difference(late(tokens), early(tokens)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int9"}, "'int9' is not known; did you mean 'int8'"),
        ({"granularity": "chanel"}, "did you mean 'channel'"),
        ({"weights": "("}, "no regular expression"),
    ],
)
def test_unknown_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantize(**options)


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"'layer/\.\*' matches no weight"):
        Quantize(weights="layer/.*")(fused(variant("llama")))
