"""llama.cpp's mixes on a graph, and importance matrices, beside the files that are written."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import xlathe as xl
from xlathe.card import Card
from xlathe.errors import CheckpointError
from xlathe.models.export import source_names, to_checkpoint
from xlathe.models.formats.gguf import plan_gguf, write_plan
from xlathe.models.formats.gguf.container import open_container
from xlathe.models.llama import Llama, LlamaConfig, describe
from xlathe.passes.canonicalize import Canonicalize
from xlathe.tools.imatrix import importance_of
from xlathe.tools.mixes import mix_pass

SIZES = LlamaConfig(vocab=96, width=64, layers=2, query_heads=2, key_value_heads=1, head_dim=32, hidden=256)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def graph() -> xl.Graph:
    return xl.trace(Llama(SIZES, rngs=nnx.Rngs(0)), max_len=32).replace(card=Card(describe(SIZES, 32)))


def test_a_mix_has_the_bytes_of_the_file(graph: xl.Graph, tmp_path: Path) -> None:
    """Rows of queries and keys have another order in a file; all others are equal as they lie."""
    write_plan(plan_gguf(to_checkpoint(graph), "Q4_K_M"), tmp_path / "model.gguf")
    file, served = open_container(tmp_path / "model.gguf"), mix_pass(graph, "Q4_K_M")(Canonicalize()(graph))
    pairs = {"token_embd": "embedding/embedding", "blk.1.ffn_down": "layers/1/feed_forward/down/kernel",
             "blk.0.attn_v": "layers/0/attention/value/kernel"}  # fmt: skip
    for theirs, ours in pairs.items():
        expected = file.bytes_of(file.entries[f"{theirs}.weight"])
        np.testing.assert_array_equal(np.asarray(served.weights[f"{ours}.blocks"]).reshape(-1), expected)
    queries = file.bytes_of(file.entries["blk.0.attn_q.weight"]).reshape(64, -1)
    found = np.asarray(served.weights["layers/0/attention/query/kernel.blocks"])
    assert sorted(map(bytes, queries)) == sorted(map(bytes, found))
    assert {"embedding/embedding": "q8_0", "layers/1/feed_forward/down/kernel": "q6_k"}.items() <= {
        name: str(scheme) for name, scheme in mix_pass(graph, "Q4_K_M").plan(graph).schemes.items()
    }.items()


def test_importance_is_the_mean_square_of_each_input(graph: xl.Graph) -> None:
    plan = plan_gguf(to_checkpoint(graph), "Q4_K_M")
    found = importance_of(graph, plan, [TOKENS])
    assert set(found) == {t.plan.name for t in plan.tensors if "norm" not in t.plan.name}
    x = np.asarray(graph.weights["embedding/embedding"])[TOKENS].reshape(-1, 64)  # of the first norm
    scale = np.asarray(graph.weights["layers/0/attention_norm/scale"])
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + SIZES.norm_epsilon) * scale
    np.testing.assert_allclose(found["blk.0.attn_k.weight"], np.square(normed).mean(0)[None], rtol=1e-4)
    np.testing.assert_array_equal(found["blk.0.attn_k.weight"], found["blk.0.attn_q.weight"])
    plan_gguf(to_checkpoint(graph), "Q4_K_M", importance=found)  # takes all of it


def test_names_lead_back(graph: xl.Graph) -> None:
    assert source_names(graph)["model.layers.1.mlp.down_proj.weight"] == "layers/1/feed_forward/down/kernel"
    with pytest.raises(CheckpointError, match="has no card"):
        mix_pass(graph.replace(card=None), "Q4_0")
