"""Memory plans equal the bytes of the arrays that they plan, and their largest sizes are the largest."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import xlathe as xl
from xlathe import passes
from xlathe.aot import Buckets, find_speculation, served_arrays, served_state, to_step
from xlathe.memory import CacheSize, MemoryPlan, plan_from_graph
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.step import first_state
from xlathe.target import find_target

SMALL = LlamaConfig(vocab=61, width=32, layers=2, query_heads=4, key_value_heads=2, head_dim=8, hidden=64)
LLAMA_2_70B = LlamaConfig(32000, width=8192, layers=80, query_heads=64, key_value_heads=8, head_dim=128, hidden=28672)
CONTEXT = 8192


@pytest.fixture(scope="module")
def forward() -> xl.Graph:
    return passes.FuseAttention()(passes.Canonicalize()(xl.trace(Llama(SMALL, rngs=nnx.Rngs(0)), max_len=64)))


LAYOUTS: dict[str, list[xl.Pass]] = {
    "contiguous": [passes.KVCache()],
    "int4": [passes.Quantize("int4", group=32), passes.KVCache()],
    "paged": [passes.KVCache(), passes.CacheLayout("paged", page=16, dtype="int8")],
}


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_cache_are_the_bytes_of_the_arrays(forward: xl.Graph, layout: str, draft: str | None) -> None:
    step = forward
    for pass_ in LAYOUTS[layout]:
        step = pass_(step)
    buckets = Buckets.of(3, 48, 4, (8,), None if draft is None else 2)
    speculation = find_speculation(step, forward if draft == "model" else draft, "match", buckets)
    plan = plan_from_graph(step, buckets, find_target("tpu-v5e"), speculation)

    assert plan.weights == sum(array.nbytes for array in served_arrays(step, speculation).values())
    for rows in buckets.batches:
        state = first_state(served_state(step, buckets, rows, speculation))
        assert plan.cache(rows, 48) == sum(array.nbytes for array in state)
    assert plan.state == plan.cache(3, 48)


def plan(**changes: Any) -> MemoryPlan:
    cache = CacheSize(row=10, token=4, page=16)
    return dataclasses.replace(MemoryPlan("h100", 2, 32, weights=1000, cache=cache, temporaries=100), **changes)


@pytest.mark.parametrize("memory", [1100, 1237, 1238, 1376, 1500, 5000])
def test_largest_sizes_fit_and_the_next_do_not(memory: int) -> None:
    found = plan(memory=memory)
    rows = found.largest_batch
    assert rows is not None
    assert rows == 0 or plan(memory=memory, batch=rows).fits
    assert not plan(memory=memory, batch=rows + 1).fits
    for batch in (1, 2):
        tokens = found.largest_context(batch)
        assert tokens is not None and tokens % 16 == 0
        assert tokens == 0 or plan(memory=memory, batch=batch, context=tokens).fits
        assert not plan(memory=memory, batch=batch, context=tokens + 16).fits


def test_what_is_not_known_is_said() -> None:
    unknown = plan(temporaries=None, unknown="not known without the compiler: pip install it", memory=None)
    assert "unknown   not known without the compiler: pip install it" in unknown.to_text()
    assert unknown.fits and unknown.free is None and unknown.largest_batch is None
    figures = json.loads(unknown.to_json())
    assert figures["temporary_bytes"] is None and figures["memory_bytes"] is None
    assert figures["cache_bytes_per_token"] == 4 and figures["cache_bytes_per_row"] == 138


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    assert plan(memory=1300).shortage == (
        "does not fit h100: needs 1.38 kB, has 1.30 kB; largest that fit: a batch of 1 at this context, "
        "a context of 32 at batch 1, a context of 16 at batch 2"
    )


def test_a_cache_without_tokens_sets_no_limit_to_the_context() -> None:
    rings = plan(cache=CacheSize(row=10, token=0, page=1), memory=2000)
    assert rings.largest_context(1) is None and rings.largest_batch == 90
    assert "any" in rings.to_text()


def test_this_machines_compiler_knows_the_temporaries(forward: xl.Graph, tmp_path: Path) -> None:
    program = xl.compile(forward, max_len=32, chunks=(8,), unit=4, target="cpu")
    assert program.memory.temporaries is not None
    logits = 4 * SMALL.vocab
    assert program.memory.temporaries >= logits  # a program takes and gives them beside the cache
    program.save(tmp_path / "bundle")
    assert xl.load(tmp_path / "bundle").memory == program.memory


@pytest.fixture(scope="module")
def shapes() -> xl.Graph:
    """A 70B Llama of shapes: its weights would be 275 GB."""
    return xl.trace(nnx.eval_shape(lambda: Llama(LLAMA_2_70B, rngs=nnx.Rngs(0))), max_len=CONTEXT)


def planned(graph: xl.Graph, *more: xl.Pass, rows: int = 1) -> MemoryPlan:
    for pass_ in (passes.Canonicalize(), passes.FuseAttention(), *more):
        graph = pass_(graph)
    found = plan_from_graph(to_step(graph), Buckets.of(rows, CONTEXT, 32, (16,)), find_target("h100"), None)
    return dataclasses.replace(found, memory=48 * 10**9)


def test_a_70b_llama_of_4_bits_with_a_context_of_8192_fits_48_gb(shapes: xl.Graph) -> None:
    count = 80 * (2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672) + 32000 * 8192  # in products, the tied embedding once
    norms, frequencies = 4 * 161 * 8192, 4 * 64
    fitting = planned(shapes, passes.Quantize("int4", group=32))
    assert fitting.weights == count * 4.5 / 8 + norms + frequencies
    assert fitting.cache.token == 80 * 2 * 8 * 128 * 4  # float32 keys and values
    assert fitting.fits and fitting.total == pytest.approx(44.0e9, rel=0.01)
    assert fitting.largest_batch == 1 and fitting.largest_context(1) == 14257


def test_of_wider_weights_none_fit(shapes: xl.Graph) -> None:
    for weights in (2, 4):  # bytes: bfloat16 or float16, and float32
        wide = plan(weights=weights * sum(array.size for array in shapes.weights.stored.values()), memory=48 * 10**9)
        assert not wide.fits and wide.largest_batch == 0 and wide.largest_context(1) == 0


def test_a_graph_of_shapes_says_that_it_has_no_values(shapes: xl.Graph, tmp_path: Path) -> None:
    assert "not compared with the model at short lengths" in shapes.report()
    for use in (lambda: shapes([[1, 2]]), lambda: shapes.save(tmp_path / "graph")):
        with pytest.raises(xl.XlatheError, match=r"has a shape and no value: this graph was traced from shapes alone"):
            use()


def test_stacked_weights_may_be_shapes() -> None:
    def model(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens]
        x, _ = jax.lax.scan(lambda carry, w: (jnp.tanh(carry @ w), None), x, params["layers"])
        return x @ params["embedding"].T

    params = {"embedding": jax.ShapeDtypeStruct((11, 4), jnp.float32)}
    params["layers"] = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    graph = xl.trace(model, params, max_len=8)
    assert [graph.aval(name).shape for name in graph.names("weight")] == [(11, 4), (4, 4), (4, 4), (4, 4)]
