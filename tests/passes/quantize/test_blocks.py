"""Weights in the blocks of GGUF files: the pass, its plan, methods, rules and bundles."""

from pathlib import Path

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

import xlathe as xl
from tests.passes.decoding import difference
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Weights
from xlathe.kernels.gguf_blocks import reference
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes import Quantize
from xlathe.passes.observe import observe
from xlathe.pipeline import Context
from xlathe.storage.block_values import VALUES

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))
KERNEL = "layers/0/feed_forward/up/kernel"


@pytest.fixture(scope="module")
def llama() -> Graph:
    from flax import nnx

    sizes = LlamaConfig(vocab=64, width=256, layers=1, query_heads=4, key_value_heads=2, head_dim=64, hidden=512)
    return xl.trace(Llama(sizes, rngs=nnx.Rngs(0)), max_len=32)


def standing_for(before: Graph, after: Graph) -> Graph:
    """The graph before, each weight being what the package gguf makes of its blocks after."""
    arrays = dict(before.weights.stored)
    for recipe in after.weights.recipes:
        kind = GGMLQuantizationType[str(recipe.make.scheme.stored).upper()]
        matrix = quants.dequantize(np.asarray(after.weights[f"{recipe.source}.blocks"]), kind)
        arrays[recipe.source] = recipe.make.layout.weight(matrix, arrays[recipe.source].shape)
    return before.replace(weights=Weights(arrays))


@pytest.mark.parametrize("scheme", ["q4_k", pytest.param("q8_0", marks=pytest.mark.breadth)])
def test_a_graph_computes_what_its_blocks_say(llama: Graph, scheme: str, tmp_path: Path) -> None:
    """Also the embedding, of which rows are looked up; and saved and loaded, as a graph and as a bundle."""
    after = Quantize(scheme)(llama)
    assert difference(after(TOKENS), standing_for(llama, after)(TOKENS)) <= 1e-5
    after.save(tmp_path / "graph")
    np.testing.assert_array_equal(xl.load_graph(tmp_path / "graph")(TOKENS), after(TOKENS))
    program = xl.compile(after, max_len=32)
    program.save(tmp_path / "bundle")
    (expected,) = program.generate([[1, 2, 3]], max_tokens=5)
    (found,) = xl.load(tmp_path / "bundle").generate([[1, 2, 3]], max_tokens=5)
    assert found.tokens == expected.tokens


def test_rules_and_the_plan(llama: Graph) -> None:
    plan = Quantize("q6_k", rules=((".*embedding.*", "q8_0"), (r".*/up/.*", "int4:g32"))).plan(llama)
    by_name = {entry.name: entry for entry in plan.entries}
    assert by_name[KERNEL].bits == 4.5 and by_name["embedding/embedding"].bits == 8.5
    assert by_name["layers/0/feed_forward/down/kernel"].bits == 210 / 32
    assert "q6_k" in str(plan) and '"scheme": "q8_0"' in plan.to_json()


def test_search_is_llama_cpp_s_with_an_importance_matrix(llama: Graph) -> None:
    batches = [TOKENS]
    squares = observe(llama, batches).inputs[KERNEL]
    importance = (squares.sum_squares / squares.count).astype(np.float32)
    after = Quantize("q4_k", method="search", weights=KERNEL)(llama, Context(calibration=batches))
    expected = reference.encode(np.asarray(llama.weights[KERNEL]).T, "Q4_K", importance)
    np.testing.assert_array_equal(after.weights[f"{KERNEL}.blocks"], expected)


@pytest.mark.parametrize("name", VALUES)
def test_what_a_scale_does_not_reach_is_refused_by_name(llama: Graph, name: str) -> None:
    huge = np.asarray(llama.weights[KERNEL]).copy()
    huge[3, 5] = 1e30
    broken = llama.replace(weights=Weights({**llama.weights.stored, KERNEL: huge}))
    with pytest.raises(PassError, match=f"{KERNEL}.*expected numbers that fit {name.upper()}"):
        Quantize(name, weights=KERNEL)(broken).weights[f"{KERNEL}.blocks"]


def test_options_that_do_not_go_together(llama: Graph) -> None:
    with pytest.raises(OptionError, match="it chooses levels and scales, which this format does not have"):
        Quantize("q4_k", method="hqq").plan(llama)
    with pytest.raises(OptionError, match=r"'q4_k:a=int3' *: activations 'int3' is not known"):
        Quantize("q4_k:a=int3")
