"""Experts of a mixture: quantized each by itself, observed by the tokens that chose them, never read unless chosen."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.passes.decoding import difference, fused
from tests.variants import DECODERS
from xlathe.aot import fix_step, to_step
from xlathe.graph import Graph, Weights
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.ops.quantized_ragged_dot import quantized_ragged_dot
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.observe import observe, unseen
from xlathe.passes.quantize import Quantize
from xlathe.pipeline import Context
from xlathe.step import empty_state, run_step
from xlathe.storage import parse_format

EXPERTS, LAYERS = 4, 2


@pytest.fixture(scope="module")
def graph() -> Graph:
    (variant,) = (v for v in DECODERS if v.name == "stacked_when_used")
    return fused(variant)


def names(layer: int, matrix: str) -> list[str]:
    return [f"layers/{layer}/experts/{e}/{matrix}" for e in range(EXPERTS)]


def test_before_and_after(graph: Graph) -> None:
    """Before: 4 matrices [32, 64] in each layer. Expected: one array of codes, a scale a row of each expert."""
    quantized = Quantize(weights=r".*/experts/.*")(graph)
    assert quantized.history[-1].hits["expert"] == 2 * EXPERTS * LAYERS
    codes, scale = (quantized.weights[f"layers/1/experts/*/ups.{part}"] for part in ("codes", "scale"))
    assert codes.shape == (EXPERTS, 64, 32) and codes.dtype == np.int8 and scale.shape == (EXPERTS, 64)
    for e, name in enumerate(names(1, "ups")):
        own_codes, own_scale = parse_format("int8:channel").encode(graph.weights[name].T)
        np.testing.assert_array_equal(codes[e], own_codes)
        np.testing.assert_array_equal(scale[e], own_scale)
    assert not any(e.primitive.name in ("ragged_dot_general", "stack") for e in quantized.jaxpr.eqns)
    trained = {origin.name: origin.shape for origin in quantized.origins}
    assert all(trained[name] == (32, 64) for layer in range(LAYERS) for name in names(layer, "ups"))


def test_experts_in_one_array_are_weights_of_their_own() -> None:
    """Before: `ups` [4, 32, 64]. Expected: four weights that rules and statistics know by name, put together again."""
    (variant,) = (v for v in DECODERS if v.name == "sorted_and_back")
    graph = fused(variant)
    assert graph.history[0].hits["experts"] == 2 * EXPERTS * LAYERS
    stacked = graph.weights.stored["layers/1/ups"]
    np.testing.assert_array_equal(graph.weights["layers/1/ups/3"], stacked[3])
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    assert f"layers/1/ups/{EXPERTS - 1}" in observe(graph, [tokens]).inputs
    quantized = Quantize(rules=((".*/ups/.*", "int4:g32"),))(graph)
    assert quantized.history[-1].hits == {"weight": 0, "expert": EXPERTS * LAYERS}
    assert quantized.weights["layers/1/ups/*.codes"].shape == (EXPERTS, 64, 16)
    step = fix_step(to_step(graph), "cpu", rows=1, slots=16, tokens=4, selected=4)
    assert step.aval("layers/1/downs/*").shape == (EXPERTS, 64, 32)


def test_a_float_expert_that_no_token_chose_is_not_read() -> None:
    """Before: XLA's product of groups, in which NaN times 0 is NaN. Expected: the logits without NaN."""
    (variant,) = (v for v in DECODERS if v.name == "one_expert")
    graph = fused(variant)
    step = fix_step(to_step(graph), "cpu", rows=1, slots=16, tokens=1, selected=1)
    assert not any(eqn.primitive.name == "ragged_dot_general" for eqn in step.jaxpr.eqns)
    one = {"tokens": [5], "positions": [0], "rows": [0], "select": [0]}
    args = {name: np.asarray(values, np.int32) for name, values in one.items()}
    graphs = (step, *(poisoned(step, e) for e in range(EXPERTS)))
    expected, *found = (run_step(graph, args, empty_state(step, 1, 16))[0] for graph in graphs)
    same = [np.array_equal(logits, expected) for logits in found]
    assert any(same) and not all(same)


def poisoned(step: Graph, expert: int) -> Graph:
    """The graph with NaN in one expert of every layer."""
    stacks = [name for name in step.arrays if name.endswith(("/ups/*", "/downs/*"))]
    nan = {name: step.arrays[name].at[expert].set(jnp.nan) for name in stacks}
    return step.replace(weights=Weights({**step.arrays, **nan}))


@pytest.mark.parametrize("options", [{}, {"scheme": "int4", "group": 32}, {"scheme": "q8_0"}], ids=str)
def test_equals_the_forward_with_rounded_experts(graph: Graph, options: dict) -> None:
    quantized = Quantize(weights=r".*/experts/.*", **options)(graph)
    arrays = dict(graph.weights.stored)
    for recipe in quantized.weights.recipes:
        for name in recipe.sources:
            maker = recipe.make.encoders[recipe.sources.index(name)]
            parts = map(jnp.asarray, maker(arrays[name]))
            arrays[name] = np.asarray(maker.scheme.stored.dequantize(*parts)).T
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    assert difference(quantized(tokens), graph.replace(weights=Weights(arrays))(tokens)) <= 1e-5
    assert difference(quantized(tokens), graph(tokens)) > 1e-4


def test_the_step_of_quantized_experts(graph: Graph) -> None:
    quantized = Quantize()(graph)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 9))
    assert difference(KVCache()(quantized)(tokens), quantized(tokens)) <= 1e-5


def test_saved_and_loaded(graph: Graph, tmp_path: Path) -> None:
    quantized = Quantize()(graph)
    quantized.save(tmp_path)
    again, tokens = xl.load_graph(tmp_path), np.arange(6)[None]
    np.testing.assert_array_equal(again(tokens), quantized(tokens))
    assert again.origins == quantized.origins


def test_some_experts_of_a_product_alone_are_near_misses(graph: Graph) -> None:
    record = Quantize(weights=r"layers/0/(wq|experts/[01]/ups)")(graph).history[-1]
    assert record.hits == {"weight": 1}
    assert record.misses == ("layers/0/experts/0/ups: only 2 of the 4 experts that are multiplied at once",)


def test_statistics_are_of_the_tokens_that_chose_an_expert(graph: Graph) -> None:
    tokens = np.random.default_rng(2).integers(0, 61, (3, 8))
    found = observe(graph, [tokens[:1], tokens[1:]], gram=True).inputs
    counts = [int(found[name].count) for name in names(0, "ups")]
    assert sum(counts) == 2 * tokens.size and min(counts) > 0 and len(set(counts)) > 1
    downs = [int(found[name].count) for name in names(0, "downs")]
    assert downs == counts
    whole = found[names(0, "ups")[0]]
    np.testing.assert_allclose(np.diag(whole.gram), whole.sum_squares, rtol=1e-5)
    # every token is counted twice, at its two experts: their sums are twice that of the router's input
    total = sum(found[name].sum_squares for name in names(0, "ups"))
    np.testing.assert_allclose(total, 2 * found["layers/0/router"].sum_squares, rtol=1e-5)


def test_an_expert_that_no_token_chose_is_listed(graph: Graph) -> None:
    stats = observe(graph, [np.array([[5]])])
    missing = unseen(stats)
    assert len(missing) == LAYERS * (EXPERTS - 2) * 2 and all("/experts/" in name for name in missing)
    assert all(int(stats.inputs[name].count) == 0 and not stats.inputs[name].absmax.any() for name in missing)
    record = Quantize()(graph, Context(calibration=[np.array([[5]])])).history[-1]
    assert record.notes == tuple(f"{name}: no token of the calibration chose this expert" for name in missing)
    assert unseen(observe(graph, [np.arange(60).reshape(2, 30)])) == ()


def operands(sizes: list[int], form: str, seed: int = 0) -> tuple[jax.Array, ...]:
    rng, count, n, k = np.random.default_rng(seed), len(sizes), 50, 96
    x = jnp.asarray(rng.normal(size=(sum(sizes) + 1, k)), jnp.float32)
    if form == "int8:channel":
        codes = jnp.asarray(rng.integers(-127, 128, (count, n, k)), jnp.int8)
        scale = jnp.asarray(rng.uniform(0.5, 1.5, (count, n)), jnp.float32)
    else:
        codes = jnp.asarray(rng.integers(0, 256, (count, n, k // 2)), jnp.uint8)
        scale = jnp.asarray(rng.uniform(0.5, 1.5, (count, n, k // 32)), jnp.bfloat16)
    return x, jnp.asarray(sizes, jnp.int32), codes, scale


@pytest.mark.parametrize("form", ["int8:channel", "int4:g32"], ids=str)
def test_each_group_is_a_product_with_its_expert(form: str) -> None:
    sizes = [3, 0, 1, 9]
    x, counts, codes, scale = operands(sizes, form)
    found = quantized_ragged_dot(x, counts, codes, scale, out_dtype="float32", format=form)
    ends = np.cumsum(sizes)
    for e, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = quantized_dot.body(x[end - size : end], codes[e], scale[e], out_dtype="float32", format=form)
        np.testing.assert_allclose(found[end - size : end], own, rtol=1e-5, atol=1e-4)
    assert not found[-1].any()  # a row of no expert


@pytest.mark.parametrize("form", ["int8:channel", "int4:g32"], ids=str)
def test_what_an_unchosen_expert_holds_never_leaks(form: str) -> None:
    x, counts, codes, scale = operands([3, 0, 1, 9], form)
    poisoned = scale.at[1].set(jnp.nan)
    clean, found = (
        quantized_ragged_dot(x, counts, codes, s, out_dtype="float32", format=form) for s in (scale, poisoned)
    )
    np.testing.assert_array_equal(found, clean)
