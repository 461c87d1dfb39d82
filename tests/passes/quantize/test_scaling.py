"""Factors of channels: the pairs that the graph has, and that moving factors between them changes nothing."""

import re

import jax
import numpy as np
import pytest

from tests.graphs import eager, graph_of, relative, tokens, traced
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.passes import PASSES
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.observe import observe
from xlathe.passes.quantize import AwqScales, Quantize, SmoothQuant
from xlathe.passes.quantize.pairs import Side, find_pairs
from xlathe.pipeline import Pipeline

NO_NORM = {"nnx_mask_buffer"}  # its norms have no weights
AUTHORINGS = ("gpt2", "gemma2", "fused_qkv", "shared_cache", "nnx_scan", "latent_and_rotary_key", "experts_top_two")
AUTHORINGS += (*NO_NORM,)
VARIANTS = {variant.name: variant for variant in DECODERS}


@pytest.mark.parametrize("name", AUTHORINGS)
def test_the_function_stays(name: str) -> None:
    graph = Canonicalize()(traced(name))
    pairs, misses = find_pairs(graph)
    assert bool(pairs) == (name not in NO_NORM) and misses
    rng, scaled = np.random.default_rng(0), graph
    for pair in pairs:
        factors = np.exp(rng.uniform(-1.5, 1.5, pair.channels))
        scaled = scaled.replace(weights=scaled.weights.derive(*pair.recipes(factors)))
    batch = graph.check_batch(tokens(VARIANTS[name], 1, 5))
    run = jax.jit(lambda arrays: graph.evaluate(graph.jaxpr, arrays, batch)[0])
    assert not pairs or relative(run(scaled.arrays), run(graph.arrays)) <= 1e-5


def test_pairs_of_a_llama() -> None:
    """A norm and q, k, v; a norm and gate, up; the rows of up and down; the last norm and the head."""
    pairs, misses = find_pairs(Canonicalize()(traced("llama")))
    first = [name for name in traced("llama").names("weight") if "layers/0" in name]
    norm = next(name for name in first if "norm" in name and pairs[0].makers[0].name == name)
    assert pairs[0].makers == (Side(norm, 0),) and pairs[0].by_norm
    assert [side.name.split("/")[-2] for side in pairs[0].readers] == ["q_proj", "k_proj", "v_proj"]
    values, product = [pair for pair in pairs if not pair.by_norm and "layers/0" in pair.makers[0].name]
    assert "/up/" in product.makers[0].name and "/down/" in product.readers[0].name
    assert "/v_proj/" in values.makers[0].name and "/o_proj/" in values.readers[0].name
    assert not misses


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "multi_query", "repeat_gqa", "broadcast_gqa", "heads_first"])
def test_values_and_what_reads_them(name: str, fused: bool) -> None:
    """Expected, in NumPy: a factor a channel of each key-value head, and the same for all query heads that share it.

    heads: of queries, and those that share their values; of 8 channels each.
    """
    heads, shared = {"multi_query": (4, 4), "heads_first": (4, 1)}.get(name, (4, 2))
    graph = Canonicalize()(traced(name))
    graph = FuseAttention()(graph) if fused else graph
    found = [pair for pair in find_pairs(graph)[0] if re.search("/wo$|/o_proj/", pair.readers[0].name)]
    (value, out), *_ = [(pair.makers[0].name, pair.readers[0].name) for pair in found]
    factors = np.random.default_rng(0).uniform(0.2, 5, (heads // shared, 8))
    scaled = graph.replace(weights=graph.weights.derive(*found[0].recipes(factors.reshape(-1))))
    before = {each: np.asarray(graph.weights[each], np.float64) for each in (value, out)}
    rows = before[out].reshape(heads, 8, -1) * np.repeat(factors, shared, axis=0)[..., None]
    np.testing.assert_allclose(scaled.weights[value], before[value] / factors.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(scaled.weights[out], rows.reshape(before[out].shape), rtol=1e-6)
    ids = tokens(VARIANTS[name], 1, 7)
    assert len(found) == 2 and relative(eager(scaled, ids), eager(graph, ids)) <= 1e-5


def test_heads_that_share_values_share_their_factors() -> None:
    """Expected, in NumPy: the largest activation and weight of a channel in both heads that read it. AWQ leaves it."""
    graph, given = Canonicalize()(traced("llama")), [tokens(VARIANTS["llama"], 4, 16)]
    name = "layers/0/attention/o_proj/kernel"
    before = np.asarray(graph.weights[name], np.float64)
    absmax = observe(graph, given).inputs[name].absmax.reshape(2, 2, 8).max(axis=1)  # groups, heads, channels
    largest = np.abs(before).max(axis=1).reshape(2, 2, 8).max(axis=1)
    factors = np.repeat(absmax**0.8 / largest**0.2, 2, axis=0).reshape(-1, 1)
    found = Pipeline([SmoothQuant(alpha=0.8, norms=False)])(graph, calibration=given)
    np.testing.assert_allclose(found.weights[name], before * factors, rtol=1e-5)
    assert Pipeline([AwqScales("int4:g8")])(graph, calibration=given).weights[name] is graph.weights[name]


def test_a_norm_by_one_plus_its_weight() -> None:
    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(11, 8)), "norm": rng.normal(size=8) / 4, "head": rng.normal(size=(8, 11))}

    def gemma(params: dict, ids: jax.Array) -> jax.Array:
        x = params["table"][ids]
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)) * (1 + params["norm"]) @ params["head"]

    graph = graph_of(gemma, **{name: value.astype(np.float32) for name, value in params.items()})
    (pair,), _ = find_pairs(graph)
    assert pair.makers == (Side("norm", 0, offset=1.0),) and pair.readers == (Side("head", 0),)
    scaled = graph.replace(weights=graph.weights.derive(*pair.recipes(np.geomspace(0.1, 10, 8))))
    ids = np.arange(6)[None]
    assert relative(scaled(ids), graph(ids)) <= 1e-5


def test_a_norm_with_a_bias() -> None:
    pairs, _ = find_pairs(Canonicalize()(traced("gpt2")))
    assert all(len(pair.makers) == 2 for pair in pairs)


@pytest.mark.parametrize("pass_", [AwqScales("int3:g8"), SmoothQuant(), SmoothQuant(norms=False)], ids=str)
def test_passes_keep_the_function(pass_) -> None:
    graph, given = Canonicalize()(traced("llama")), [tokens(VARIANTS["llama"], 2, 16)]
    found = Pipeline([pass_], verify=True)(graph, calibration=given)
    assert found.structural_hash == graph.structural_hash
    projections = {AwqScales("int3:g8"): 2, SmoothQuant(): 0}.get(pass_, 4)
    assert found.history[-1].hits == {"norm": 5, "projection": projections}
    assert Pipeline.parse(str(pass_), PASSES).passes == (pass_,)


def test_an_outlier_channel_is_made_good() -> None:
    """A channel of x100 that the weights behind it take back: rounding loses it, and with AWQ's scales does not."""
    graph, given = Canonicalize()(traced("llama")), [tokens(VARIANTS["llama"], 2, 16, seed=s) for s in range(4)]
    pairs, _ = find_pairs(graph)
    for pair in pairs:
        factors = np.ones(pair.channels)
        factors[3] = 0.01
        graph = graph.replace(weights=graph.weights.derive(*pair.recipes(factors)))
    held_out = tokens(VARIANTS["llama"], 2, 16, seed=99)

    def error(*passes) -> float:
        found = Pipeline(passes)(graph, calibration=given)
        return float(np.square(np.asarray(found(held_out) - graph(held_out))).mean())

    plain, scaled = error(Quantize("int4:g32")), error(AwqScales("int4:g32"), Quantize("int4:g32"))
    assert scaled < 0.5 * plain
    dynamic = "int8:channel,a=int8_token"
    assert error(SmoothQuant(norms=False), Quantize(dynamic)) < 0.2 * error(Quantize(dynamic))


def test_bad_input() -> None:
    with pytest.raises(OptionError, match=r"alpha=1\.5: expected a number from 0 to 1"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(OptionError, match="scheme='bf16' has no scales"):
        AwqScales("bf16")
    with pytest.raises(OptionError, match="needs at least one batch"):
        SmoothQuant()(Canonicalize()(traced("llama")))
    graph = Canonicalize()(traced("nnx_mask_buffer"))
    with pytest.raises(PassError, match="no channels that weights make and weights read; nearly: "):
        Pipeline([SmoothQuant()])(graph, calibration=[tokens(VARIANTS["nnx_mask_buffer"], 1, 4)])


def test_a_weight_that_two_layers_multiply_with_blocks_its_pairs() -> None:
    """Expected: near misses that name it, and the channels that it does not make all the same."""
    rng = np.random.default_rng(0)
    shapes = {"table": (24, 16), "a": (16, 8), "first": (8, 16), "second": (8, 16), "head": (16, 24)}

    def model(params, ids):
        x = params["table"][ids]
        x = x + x @ params["a"] @ params["first"]
        return (x + x @ params["a"] @ params["second"]) @ params["head"]

    graph = graph_of(model, **{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    pairs, misses = find_pairs(graph)
    assert not pairs and any("a is used elsewhere too" in miss for miss in misses)


@pytest.mark.parametrize("pass_", [SmoothQuant(), AwqScales("int8:channel")])
def test_weights_that_are_not_finite_are_named(pass_) -> None:
    """Before: one NaN in a weight that reads a norm. Expected: an error, where factors would spread it."""
    graph = Canonicalize()(traced("llama"))
    name = next(name for name in graph.names("weight") if "up" in name)
    broken = np.array(graph.arrays[name])
    broken[3, 5] = np.nan
    with pytest.raises(PassError, match=rf"{name} has 1 of {broken.size} values that are not finite, the first nan in"):
        Pipeline([pass_])(graph.with_weights({name: broken}), calibration=[tokens(VARIANTS["llama"], 1, 4)])


def test_groups_that_do_not_divide() -> None:
    graph, batch = Canonicalize()(traced("llama")), tokens(VARIANTS["llama"], 1, 4)
    with pytest.raises(PassError, match="awq_scales: scheme='int4:g96': group=96 does not divide"):
        Pipeline([AwqScales("int4:g96")])(graph, calibration=[batch])
