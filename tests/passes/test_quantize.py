"""Quantized weights: which are replaced, by what, and that the graph computes with exactly those values."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.graphs import graph_of
from tests.passes.decoding import difference, fused, traced
from tests.variants import DECODERS, Variant
from xlathe.errors import OptionError
from xlathe.graph import Graph, Weights
from xlathe.passes import PASSES
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.quantize import Quantize
from xlathe.passes.quantize.recipe import Encode
from xlathe.passes.quantize.rtn import Rtn
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Layout
from xlathe.pipeline import Pipeline
from xlathe.storage import parse_format
from xlathe.verify import check_structure

AUTHORINGS = ["llama", "gpt2", "linen_multi_head_attention", "fused_qkv", "tied_head", "nnx_scan"]


def variant(name: str) -> Variant:
    return next(v for v in DECODERS if v.name == name)


def dequantized(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | int = 8) -> np.ndarray:
    """Float32 [n, k] of int8 codes and a scale a row, or of 4-bit codes, two a byte, in groups."""
    if codes.dtype == np.int8:
        return codes * scale[:, None]
    whole = unpacked(codes)
    grouped = whole.reshape(*scale.shape, -1)
    offset = grouped - np.broadcast_to(zero, scale.shape)[..., None]
    return (offset * scale.astype(np.float32)[..., None]).astype(np.float32).reshape(whole.shape)


def unpacked(codes: np.ndarray) -> np.ndarray:
    """4-bit codes int32 [n, k], of two a byte, the earlier in the low half."""
    whole = np.empty((len(codes), 2 * codes.shape[1]), np.int32)
    whole[:, 0::2], whole[:, 1::2] = codes % 16, codes // 16
    return whole


def rounded(original: Graph, quantized: Graph) -> Graph:
    """The original graph with each quantized weight replaced by what its codes stand for, in its own layout."""
    arrays = dict(original.weights.stored)
    for recipe in quantized.weights.recipes:
        weight, made = arrays[recipe.source], recipe.make
        order = (*made.layout.free, *made.layout.contracted)
        grouped = dequantized(*made(weight)).reshape([weight.shape[i] for i in order])
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
    codes, scale = Encode("w", Layout((2, 1), (0,)), Scheme.parse("int8"), Rtn())(weight)
    assert codes.shape == (12, 5) and codes.dtype == np.int8 and scale.dtype == np.float32
    channel = weight[:, 1, 3]  # row 3 * 3 + 1
    np.testing.assert_allclose(scale[10], np.abs(channel).max() / 127, rtol=1e-6)
    np.testing.assert_array_equal(codes[10], np.rint(channel.astype(np.float64) / scale[10]))
    assert not codes[7].any() and scale[7] == 0  # a channel of zeros stays zeros


def test_error_of_a_value_is_at_most_half_a_step() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    codes, scale = parse_format("int8").encode(weight)
    assert np.abs(codes * scale[:, None] - weight).max() <= scale.max() * 0.5001
    assert np.abs(codes).max() == 127


INT4: list[dict[str, Any]] = [{"group": 4}, {"group": 4, "symmetric": False}]


@pytest.mark.parametrize("options", INT4)
@pytest.mark.parametrize("name", ["llama", "tied_head", "fused_qkv"])
def test_int4_equals_the_forward_with_rounded_weights(name: str, options: dict[str, Any]) -> None:
    original = traced(variant(name))
    quantized = Quantize("int4", **options)(fused(variant(name)))
    tokens = np.random.default_rng(0).integers(0, variant(name).vocab, (2, 9))
    assert difference(quantized(tokens), rounded(original, quantized)(tokens)) <= 1e-5
    assert difference(quantized(tokens), original(tokens)) > 1e-3


def test_int4_before_and_after() -> None:
    """Before: float32 weights. Expected: half a byte a code, 2 bytes a group, and no product left in floats."""
    before = fused(variant("llama"))
    graph = Quantize("int4", group=8)(before)
    for name in (n.removesuffix(".codes") for n in graph.names("weight") if n.endswith(".codes")):
        n, k = before.aval(name).shape[::-1]
        assert (graph.aval(f"{name}.codes").shape, graph.aval(f"{name}.codes").dtype) == ((n, k // 2), "uint8")
        assert (graph.aval(f"{name}.scale").shape, graph.aval(f"{name}.scale").dtype) == ((n, k // 8), "bfloat16")
        parts = dict(graph.weights.prepare([f"{name}.codes", f"{name}.scale"]))
        assert sum(part.nbytes for part in parts.values()) * 8 == n * k * (4 + 16 / 8)
    assert sum(e.primitive.name == "xlathe.quantized_dot" for e in graph.jaxpr.eqns) == 15


def test_symmetric_groups_by_their_definition() -> None:
    """Expected: the value of largest magnitude is code 0, 8 steps from zero, in a step of 8 significant bits."""
    weight = np.random.default_rng(2).normal(size=(6, 64)).astype(np.float32)
    weight[1], weight[2, :32], weight[3, 5] = 0.0, -np.abs(weight[2, :32]), 1e6
    packed, scale = parse_format("int4:g32").encode(weight)
    codes = unpacked(packed)
    assert (packed.dtype, scale.dtype) == ("uint8", "bfloat16")
    for n, g in np.ndindex(6, 2):
        values, found = weight[n, 32 * g : 32 * g + 32].astype(np.float64), codes[n, 32 * g : 32 * g + 32]
        step = values[np.argmax(np.abs(values))] / -8
        assert abs(float(scale[n, g]) - step) <= 2**-8 * abs(step)
        np.testing.assert_array_equal(found, np.clip(np.rint(values / (float(scale[n, g]) or 1)), -8, 7) + 8)
    assert (codes[1] == 8).all() and (scale[1] == 0).all()
    assert codes[3, 5] == 0 and (np.delete(codes[3, :32], 5) == 8).all()


def test_asymmetric_groups_by_their_definition() -> None:
    """Expected: 15 steps from the least to the largest value, both moved to zero where it is not between them."""
    weight = np.random.default_rng(3).normal(size=(6, 64)).astype(np.float32)
    weight[1], weight[2, :32], weight[3, :32] = 0.0, -np.abs(weight[2, :32]), 5 + np.abs(weight[3, :32])
    packed, scale, zero = parse_format("int4:g32,asym").encode(weight)
    codes = unpacked(packed)
    for n, g in np.ndindex(6, 2):
        values, found = weight[n, 32 * g : 32 * g + 32].astype(np.float64), codes[n, 32 * g : 32 * g + 32]
        low, high, step = min(values.min(), 0), max(values.max(), 0), float(scale[n, g])
        assert abs(step - (high - low) / 15) <= 2**-8 * (high - low)
        assert zero[n, g] == min(np.rint(-low / (step or 1)), 15)
        np.testing.assert_array_equal(found, np.clip(np.rint(values / (step or 1)) + zero[n, g], 0, 15))
        assert np.abs((found.astype(int) - zero[n, g]) * step - values).max() <= 1.1 * step
    assert (codes[1] == zero[1, 0]).all() and zero[2, 0] == 15 and zero[3, 0] == 0


def test_a_group_must_divide_the_contracted_axis() -> None:
    message = r"group=12 does not divide 32; g2, g4, g8, g16, g32 would, the values that .* \[32, \d+\] is summed over"
    with pytest.raises(OptionError, match=message):
        Quantize("int4", group=12)(fused(variant("llama")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "quantize{scheme=int4}"),
        ({"group": 64, "symmetric": False}, "quantize{scheme=int4,group=64,symmetric=false}"),
        ({"granularity": "group", "activations": "int8"}, "quantize{scheme=int4,granularity=group,activations=int8}"),
    ],
)
def test_int4_as_text(options: dict[str, Any], text: str) -> None:
    assert str(Quantize("int4", **options)) == text
    assert Pipeline.parse(text, PASSES).passes == (Quantize("int4", **options),)


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
        ({"group": 32, "granularity": "channel"}, "channel and g32 exclude each other"),
        ({"scheme": "int4:g32", "group": 32}, "'int4:g32' has all its options in it; found group beside it"),
        ({"scheme": "nf4", "symmetric": False}, "zero points are for integers"),
        ({"activations": "int8"}, "expected a group that is a multiple of 32"),
        ({"rules": ((".*", "int8"),), "group": 32}, "group without a scheme"),
        ({"method": "rtm"}, "unknown method 'rtm'; did you mean 'rtn'"),
        ({"scheme": "int4", "activations": "int9"}, "'int9' is not known; did you mean 'int8'"),
        ({"scheme": "int4", "group": 0}, "group=0: expected a positive number"),
        ({"scheme": "int4", "group": 7}, "group=7: expected a positive multiple of 2"),
        ({"scheme": "int4", "group": 16, "activations": "int8"}, "multiple of 32 where activations are rounded"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantize(**options)


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"'layer/\.\*' matches no weight"):
        Quantize(weights="layer/.*")(fused(variant("llama")))


def test_the_error_tells_near_misses() -> None:
    graph = matrices(lambda p, x: x @ (p["a"] @ p["b"]))
    with pytest.raises(OptionError, match=r"nearly: a: it is multiplied with what is made of weights alone at .*; b: "):
        Quantize(weights="a|b")(graph)


RNG = np.random.default_rng(5)
IDS = np.array([[1, 2, 3]], np.int32)
MATRICES = {
    "embed": RNG.normal(size=(11, 8)).astype(np.float32),
    "head": RNG.normal(size=(8, 11)).astype(np.float32),
    "square": RNG.normal(size=(8, 8)).astype(np.float32),
    "one": RNG.normal(size=(1, 8, 8)).astype(np.float32),
    "a": RNG.normal(size=(8, 2)).astype(np.float32),
    "b": RNG.normal(size=(2, 8)).astype(np.float32),
}


def matrices(middle: Callable) -> Graph:
    """A model whose middle maps x [b, t, 8] to the same shape with some of the matrices."""
    function = lambda p, ids: middle(p, p["embed"][ids]) @ p["head"]  # noqa: E731
    return Canonicalize()(graph_of(function, **MATRICES))


@pytest.mark.parametrize(
    "middle",
    [
        lambda p, x: x @ p["one"].reshape(8, 8),
        lambda p, x: x @ p["one"][0],
        lambda p, x: x @ p["one"].transpose(1, 0, 2).reshape(8, 8),
        lambda p, x: jnp.einsum("btd,xdf->btxf", x, p["one"])[:, :, 0],
    ],
)
def test_axes_of_size_one(middle: Callable) -> None:
    graph = matrices(middle)
    quantized = Quantize()(graph)
    assert quantized.aval("one.codes").shape == (8, 8)
    assert difference(quantized(IDS), rounded(graph, quantized)(IDS)) <= 1e-5


@pytest.mark.parametrize(
    ("middle", "misses"),
    [
        (lambda p, x: x @ (p["a"] @ p["b"]), ["a: it is multiplied with", "b: it is multiplied with"]),
        (lambda p, x: x @ (p["square"] @ p["square"].T), ["square: it is multiplied with what is made of weights"]),
        (lambda p, x: x @ (p["square"] * 0 + p["a"] @ p["b"]), ["a: ", "b: "]),
        (
            lambda p, x: x @ p["square"].astype(jnp.int8).astype(jnp.float32),
            ["square: convert_element_type to int8 changes its values at "],
        ),
        (
            lambda p, x: x @ p["square"].astype(jnp.bfloat16).astype(jnp.float32),
            ["square: convert_element_type to float32 changes its values at "],
        ),
        (
            lambda p, x: x @ p["square"].astype(jnp.float8_e4m3fn).astype(jnp.float32),
            ["square: convert_element_type to float8_e4m3fn changes its values at "],
        ),
        (
            lambda p, x: x @ lax.reduce_precision(p["square"], 8, 7),
            ["square: reduce_precision to float32 changes its values at "],
        ),
    ],
)
def test_what_a_quantized_weight_would_not_stand_for_is_a_near_miss(middle: Callable, misses: list[str]) -> None:
    graph = matrices(middle)
    quantized = Quantize()(graph)
    check_structure(quantized)
    found = quantized.history[-1].misses
    assert len(found) == len(misses) and all(map(str.startswith, found, misses))
    assert [name for name in quantized.names("weight") if name.endswith(".codes")] == ["head.codes"]
    assert difference(quantized(IDS), rounded(graph, quantized)(IDS)) <= 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_product_in_a_coarse_dtype_is_quantized(dtype: type) -> None:
    """Expected: codes of the float32 weight, and activations and results of the product in the coarse dtype."""
    middle = lambda p, x: (x.astype(dtype) @ p["square"].astype(dtype)).astype(jnp.float32)  # noqa: E731
    graph = matrices(middle)
    quantized = Quantize(weights="square")(graph)
    codes, scale = parse_format("int8").encode(MATRICES["square"].T)
    x = np.asarray(jnp.asarray(MATRICES["embed"][IDS]).astype(dtype).astype(jnp.float32))
    y = jnp.asarray(x @ (codes * scale[:, None]).T).astype(dtype).astype(jnp.float32)
    eps = float(jnp.finfo(dtype).eps)
    assert difference(quantized(IDS), y @ MATRICES["head"]) <= eps
