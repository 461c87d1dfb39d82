"""Graphs that multiply with the blocks of a GGUF file as they are, beside the file's numbers as floats."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.models.formats.gguf.quantized_cases import MODELS
from tests.models.tiny import tiny_checkpoint
from tests.passes.decoding import difference
from xlathe.errors import CheckpointError, OptionError
from xlathe.kernels.gguf_blocks.layouts import LAYOUTS
from xlathe.models.formats.gguf import write_gguf
from xlathe.models.formats.gguf.container import Container, open_container
from xlathe.storage import parse_format

LLAMA = MODELS["own"] | {"num_hidden_layers": 2, "num_key_value_heads": 2}  # tied: rows are looked up and multiplied
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 64, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 512,
    "layer_norm_epsilon": 1e-5,
}
CONFIGS = {"llama": LLAMA, "experts": MODELS["experts"], "gpt2": GPT2}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))


def written(folder: Path, config: str, type: str) -> Path:
    write_gguf(tiny_checkpoint(CONFIGS[config]), folder / "m.gguf", type)
    return folder / "m.gguf"


def blocks_in(file: Container, name: str) -> np.ndarray:
    entry = file.entries[name]
    return file.bytes_of(entry).reshape(entry.shape[0], -1)


@pytest.mark.parametrize(
    ("config", "type"),
    [
        ("llama", "Q4_K_M"),
        *(pytest.param("llama", type, marks=pytest.mark.breadth) for type in ("Q8_0", "Q4_0", "Q2_K", "Q3_K_M")),
        pytest.param("experts", "Q4_K_M", marks=pytest.mark.breadth),
        ("gpt2", "Q5_K_M"),
    ],
)
def test_computes_what_the_file_says(tmp_path: Path, config: str, type: str) -> None:
    path = written(tmp_path, config, type)
    packed, floats = xl.from_pretrained(path, max_len=32), xl.from_pretrained(path, max_len=32, packed=False)
    entries = open_container(path).entries.values()
    assert packed.history[-1].hits["weight"] == sum(
        entry.shape[0] if len(entry.shape) == 3 else 1 for entry in entries if entry.type.name in LAYOUTS
    )
    assert difference(packed(TOKENS), floats(TOKENS)) <= 1e-5
    options = {"max_tokens": 8}
    (found,), (expected,) = (xl.compile(graph).generate(TOKENS[:1], **options) for graph in (packed, floats))
    assert found.tokens == expected.tokens


def test_nothing_is_encoded_anew(tmp_path: Path) -> None:
    """Rows of the query and key projections, which the file has in another order, are moved whole."""
    path = written(tmp_path, "llama", "Q4_K_M")
    file, graph = open_container(path), xl.from_pretrained(path, max_len=32)
    ours = {"up": "ffn_up", "down": "ffn_down", "gate": "ffn_gate"}
    for part, theirs in ours.items():
        found = graph.weights[f"layers/1/feed_forward/{part}/kernel.blocks"]
        np.testing.assert_array_equal(found, blocks_in(file, f"blk.1.{theirs}.weight"))
    np.testing.assert_array_equal(graph.weights["embedding/embedding.blocks"], blocks_in(file, "token_embd.weight"))
    query = graph.weights["layers/1/attention/query/kernel.blocks"]
    expected = blocks_in(file, "blk.1.attn_q.weight").reshape(4, 32, 2, -1).swapaxes(1, 2).reshape(query.shape)
    np.testing.assert_array_equal(query, expected)
    floats = xl.from_pretrained(path, max_len=32, packed=False)
    stored = parse_format(file.entries["blk.1.attn_q.weight"].type.name.lower())
    np.testing.assert_array_equal(stored.dequantize(query).T, floats.weights["layers/1/attention/query/kernel"])


def test_a_bundle_has_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", "Q4_K_M")
    program = xl.compile(xl.from_pretrained(path, max_len=32))
    program.save(tmp_path / "bundle")
    loaded = xl.load(tmp_path / "bundle")
    np.testing.assert_array_equal(
        loaded.arrays["layers/0/feed_forward/down/kernel.blocks"],
        blocks_in(open_container(path), "blk.0.ffn_down.weight"),
    )
    (found,), (expected,) = (each.generate(TOKENS[:1], max_tokens=8) for each in (loaded, program))
    assert found.tokens == expected.tokens


def test_scales_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", "Q8_0")
    entry = open_container(path).entries["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[entry.start + 34 : entry.start + 36] = np.array([np.inf], "<f2").tobytes()
    path.write_bytes(data)
    graph = xl.from_pretrained(path, max_len=32)
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight': expected blocks with finite scales"):
        graph.weights["layers/0/feed_forward/up/kernel.blocks"]


def test_what_is_told(tmp_path: Path) -> None:
    graph = xl.from_pretrained(written(tmp_path, "llama", "Q4_K_M"), max_len=32)
    record = graph.history[-1]
    assert record.name == "packed" and record.hits["weight"] == 15 and not record.misses
    assert dataclasses.replace(record, hits={}) and "packed" in graph.report()


def test_activations_that_are_rounded(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", "Q4_K_M")
    rounding = xl.from_pretrained(path, max_len=32, activations="int8")
    assert 1e-4 < difference(rounding(TOKENS), xl.from_pretrained(path, max_len=32)(TOKENS)) < 0.1
    with pytest.raises(OptionError, match="expected packed weights and no static steps; no weight is packed"):
        xl.from_pretrained(path, packed=False, activations="int8")
    with pytest.raises(OptionError, match="its steps come from calibration"):
        xl.from_pretrained(path, activations="int8_static")
    with pytest.raises(OptionError, match="activations 'int9' is not known"):
        xl.from_pretrained(path, activations="int9")


def test_no_layout_of_other_tools_has_blocks(tmp_path: Path) -> None:
    graph = xl.from_pretrained(written(tmp_path, "llama", "Q4_K_M"), max_len=32)
    with pytest.raises(xl.CheckpointError, match=r"gptq holds no blocks of GGUF; from_pretrained\(.*packed=False\)"):
        graph.save_pretrained(tmp_path / "b", layout="gptq")
