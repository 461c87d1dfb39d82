"""Graphs back into Hugging Face directories."""

from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.models.tiny import GEMMA2, write_tiny
from xlathe import passes

TOKENS = np.arange(20).reshape(2, 10) % 61


def shaped(graph: xl.Graph, *more: xl.Pass) -> xl.Graph:
    return xl.Pipeline([passes.Canonicalize(), passes.FuseAttention(), *more])(graph)


def test_bytes_come_back(tmp_path: Path) -> None:
    xl.from_pretrained(write_tiny(tmp_path / "a", dtype=np.float16)).save_pretrained(tmp_path / "b")
    before, after = (tmp_path / folder / "model.safetensors" for folder in "ab")
    assert before.read_bytes() == after.read_bytes()


def test_a_pruned_graph_and_its_configuration(tmp_path: Path) -> None:
    graph = xl.from_pretrained(write_tiny(tmp_path / "a"))
    pruned = shaped(graph, passes.PruneStructured(heads=0.5, neurons=0.5))
    pruned.save_pretrained(tmp_path / "b")
    again = xl.from_pretrained(tmp_path / "b")
    expected = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
    assert again.card is not None
    assert {key: again.card.config[key] for key in expected} == expected
    np.testing.assert_allclose(again(TOKENS), pruned(TOKENS), rtol=0, atol=1e-6)


def test_layers_are_renumbered(tmp_path: Path) -> None:
    graph = xl.from_pretrained(write_tiny(tmp_path / "a"))
    fewer = without_first(graph)
    fewer.save_pretrained(tmp_path / "b")
    again = xl.from_pretrained(tmp_path / "b")
    assert again.card is not None and again.card.config["num_hidden_layers"] == 2
    np.testing.assert_allclose(again(TOKENS), fewer(TOKENS), rtol=0, atol=1e-6)


def test_layers_whose_form_follows_from_their_index(tmp_path: Path) -> None:
    """Before: windows on even layers. Expected: without layer 0, only a list of kinds can say so."""
    write_tiny(tmp_path / "a", GEMMA2)
    write_tiny(tmp_path / "b", GEMMA2 | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})
    plain, listed = (without_first(xl.from_pretrained(tmp_path / folder)) for folder in "ab")
    with pytest.raises(xl.CheckpointError, match="sliding_window gives a layer its form by its index"):
        plain.save_pretrained(tmp_path / "c")
    listed.save_pretrained(tmp_path / "d")
    np.testing.assert_allclose(xl.from_pretrained(tmp_path / "d")(TOKENS), listed(TOKENS), rtol=0, atol=1e-5)


def without_first(graph: xl.Graph) -> xl.Graph:
    from xlathe.passes.prune.depth import without_layers

    return without_layers(shaped(graph), (0,))


def test_refusals(tmp_path: Path) -> None:
    graph = xl.from_pretrained(write_tiny(tmp_path / "a"))
    with pytest.raises(xl.CheckpointError, match=r"\.codes is no weight of a LlamaForCausalLM"):
        shaped(graph, passes.Quantize("int8")).save_pretrained(tmp_path / "b")
    traced = xl.trace(lambda p, tokens: p["e"][tokens], params={"e": np.ones((4, 4), np.float32)}, max_len=8)
    with pytest.raises(xl.CheckpointError, match="the graph has no card"):
        traced.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
