"""Graphs back into Hugging Face directories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xlathe as xl
from tests.models.tiny import GEMMA2, LLAMA, MIXTRAL, tiny_checkpoint, write_tiny
from tests.passes.decoding import difference
from xlathe import passes
from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.huggingface import write_huggingface

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
    assert difference(again(TOKENS), pruned(TOKENS)) <= 1e-5


@pytest.mark.parametrize("config", [MIXTRAL, GEMMA2], ids=lambda config: config["model_type"])
def test_what_nothing_was_changed_of_has_the_same_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    xl.from_pretrained(write_tiny(tmp_path / "a", config)).save_pretrained(tmp_path / "b")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab")
    assert after == before | {"dtype": "float32"}


def test_layers_for_drafting_are_no_surplus(tmp_path: Path) -> None:
    """Before: a layer beyond the last, as DeepSeek-V3 has it. Expected: ignored, where the settings say so."""
    made = tiny_checkpoint(LLAMA)
    extra = {"model.layers.3.enorm.weight": made.tensors["model.norm.weight"]}
    for more in (0, 1):
        card = Card({**LLAMA, "num_nextn_predict_layers": more})
        write_huggingface(Checkpoint(card, {**made.tensors, **extra}, "test"), tmp_path / str(more))
    assert xl.from_pretrained(tmp_path / "1").vocab == 61
    with pytest.raises(xl.CheckpointError, match=r"'model\.layers\.3\.enorm\.weight': no part of"):
        xl.from_pretrained(tmp_path / "0")


def test_layers_are_renumbered(tmp_path: Path) -> None:
    graph = xl.from_pretrained(write_tiny(tmp_path / "a"))
    fewer = without_first(graph)
    fewer.save_pretrained(tmp_path / "b")
    again = xl.from_pretrained(tmp_path / "b")
    assert again.card is not None and again.card.config["num_hidden_layers"] == 2
    assert difference(again(TOKENS), fewer(TOKENS)) <= 1e-5


def test_layers_whose_form_follows_from_their_index(tmp_path: Path) -> None:
    """Before: windows on even layers. Expected: without layer 0, only a list of kinds can say so."""
    write_tiny(tmp_path / "a", GEMMA2)
    write_tiny(tmp_path / "b", GEMMA2 | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})
    plain, listed = (without_first(xl.from_pretrained(tmp_path / folder)) for folder in "ab")
    with pytest.raises(xl.CheckpointError, match="sliding_window gives a layer its form by its index"):
        plain.save_pretrained(tmp_path / "c")
    listed.save_pretrained(tmp_path / "d")
    assert difference(xl.from_pretrained(tmp_path / "d")(TOKENS), listed(TOKENS)) <= 1e-5


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
