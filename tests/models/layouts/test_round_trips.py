"""Graphs that travel: what comes back is, bit for bit, what was quantized; layouts written out in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.models.layouts.cases import TOKENS, Case
from tests.models.layouts.damage import rewrite
from tests.models.layouts.write_models import FLOATS, float_graph, quantized_graph
from tests.models.tiny import MIXTRAL, write_tiny
from tests.passes.decoding import difference
from xlathe import passes
from xlathe.safetensors_file import read_safetensors
from xlathe.tools.main import main

KEY = "model.layers.1.self_attn.k_proj"
OURS = "layers/1/attention/key/kernel"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CASES = (
    Case("gptq", "int2:g32,s=f16"),
    Case("gptq", "int3:g64,s=f16"),
    Case("gptq", "int8:channel,s=f16"),
    Case("gptq_v2", "int3:g32,asym,s=f16"),
    Case("gptq_v2", "int8:g32,asym,s=f16"),
    Case("awq", "int4:channel,s=f16,asym"),
    Case("compressed-tensors", "int2:g32,asym"),
    Case("compressed-tensors", "int3:channel"),
    Case("compressed-tensors", "int8:g64,asym,s=f32"),
    Case("compressed-tensors", "int8:tensor"),
    Case("compressed-tensors", "int4:g32,a=int8_token"),
    Case("compressed-tensors", "fp8_e4m3:b48x32,a=fp8_token"),
)


def same(left: xl.Graph, right: xl.Graph) -> bool:
    names = left.names("weight")
    assert sorted(names) == sorted(right.names("weight"))
    arrays = [graph.weights.prepare(list(names)) for graph in (left, right)]
    return all(np.asarray(arrays[0][n]).tobytes() == np.asarray(arrays[1][n]).tobytes() for n in names)


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(c, marks=pytest.mark.breadth) for c in CASES[1:])], ids=str)
def test_bits_come_back(case: Case, tmp_path: Path) -> None:
    graph = quantized_graph(case)
    graph.save_pretrained(tmp_path, layout=case.layout)
    again = xl.from_pretrained(tmp_path)
    assert same(graph, again)
    assert again.structural_hash == graph.structural_hash
    assert again.card is not None and "quantization_config" not in again.card.config
    assert again.history[0].hits == {"weight": 14} and not again.history[0].misses


def test_static_activations_come_back(tmp_path: Path) -> None:
    step = passes.Quantize("fp8_e4m3:tensor,a=fp8_static", rules=FLOATS)
    graph = xl.Pipeline([step])(float_graph(), calibration=[TOKENS])
    graph.save_pretrained(tmp_path, layout="compressed-tensors")
    again = xl.from_pretrained(tmp_path)
    assert same(graph, again) and f"{OURS}.input" in again.names("weight")
    rewrite(tmp_path, lambda held: held.update({f"{KEY}.input_scale": held[f"{KEY}.input_scale"].reshape(())}))
    assert same(graph, xl.from_pretrained(tmp_path))
    other = xl.from_pretrained(tmp_path, activations="fp8_token")  # the file's steps are of no use then
    assert other.history[0].hits == {"weight": 14} and not other.history[0].misses
    assert f"{OURS}.codes" in other.names("weight") and f"{OURS}.input" not in other.names("weight")
    for unknown in ("", 3):
        with pytest.raises(xl.OptionError, match=f"activations {unknown!r} is not known"):
            xl.from_pretrained(tmp_path, activations=unknown)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq"])
def test_a_tied_head_is_left_out(layout: str, tmp_path: Path) -> None:
    """Files do not have it, and readers would quantize it as the linear module that it is."""
    graph = quantized_graph(Case(layout, "int4:g32", tied=True))
    graph.save_pretrained(tmp_path, layout=layout)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["ignore" if layout == "compressed-tensors" else "modules_to_not_convert"] == ["lm_head"]
    assert difference(xl.from_pretrained(tmp_path)(TOKENS), graph(TOKENS)) <= 1e-6


def test_projections_that_gptq_leaves_out(tmp_path: Path) -> None:
    """transformers goes by the names that are quantized, vLLM by those that are not."""
    graph = quantized_graph(Case("gptq", "int4:g32,s=f16", floats="down"))
    graph.save_pretrained(tmp_path, layout="gptq")
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    mlp, attention = ("gate", "up"), ("q", "k", "v", "o")
    names = [*(f"self_attn.{part}_proj" for part in attention), *(f"mlp.{part}_proj" for part in mlp)]
    assert sorted(said["modules_in_block_to_quantize"][0]) == sorted(names)
    assert list(said["dynamic"]) == [rf"-:^model\.layers\.{i}\.mlp\.down_proj$" for i in range(2)]
    assert same(graph, xl.from_pretrained(tmp_path))


def test_experts_and_several_schemes(tmp_path: Path) -> None:
    """Before: experts that lie in one array. Expected: each is a module, and one array again when it is read."""
    write_tiny(tmp_path / "a", MIXTRAL)
    rules = (*FLOATS, (".*router.*", "none"), (".*/attention/.*", "int8:channel,a=int8_token"))
    graph = xl.Pipeline([passes.Quantize("int4:g16", rules=rules)])(xl.from_pretrained(tmp_path / "a"))
    graph.save_pretrained(tmp_path / "b", layout="compressed-tensors")
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert [group["format"] for group in said["config_groups"].values()] == ["int-quantized", "pack-quantized"]
    assert "model.layers.0.block_sparse_moe.gate" in said["ignore"]
    again = xl.from_pretrained(tmp_path / "b")
    assert same(graph, again)
    assert [origin.shape for origin in again.origins] and len(again.origins) == len(graph.origins)


def test_gptq_as_its_paper_says(tmp_path: Path) -> None:
    """Codes of eight inputs in a word, the first lowest; zero points of eight outputs, less one."""
    graph = quantized_graph(Case("gptq", "int4:g32,asym"))
    graph.save_pretrained(tmp_path, layout="gptq")
    held = {suffix: tensor(tmp_path, f"{KEY}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    words, zeros = held["qweight"].view(np.uint32), held["qzeros"].view(np.uint32)
    weight = np.empty((32, 64), np.float32)
    for n in range(32):
        for k in range(64):
            code = words[k // 8, n] >> np.uint32(4 * (k % 8)) & 15
            zero = (zeros[held["g_idx"][k], n // 8] >> np.uint32(4 * (n % 8)) & 15) + 1
            weight[n, k] = (np.float32(code) - np.float32(zero)) * np.float32(held["scales"][held["g_idx"][k], n])
    np.testing.assert_array_equal(weight, decoded(graph))


def test_awq_as_its_code_says(tmp_path: Path) -> None:
    """Codes of eight outputs in a word, the even ones first; symmetric ones have a zero point of 8."""
    graph = quantized_graph(Case("awq", "int4:g32"))
    graph.save_pretrained(tmp_path, layout="awq")
    words, scales = tensor(tmp_path, f"{KEY}.qweight").view(np.uint32), tensor(tmp_path, f"{KEY}.scales")
    assert (tensor(tmp_path, f"{KEY}.qzeros").view(np.uint32) == 0x88888888).all()
    weight = np.empty((32, 64), np.float32)
    for n in range(32):
        place = ORDER.index(n % 8)
        for k in range(64):
            code = words[k, n // 8] >> np.uint32(4 * place) & 15
            weight[n, k] = (np.float32(code) - 8) * np.float32(scales[k // 32, n])
    np.testing.assert_array_equal(weight, decoded(graph))
    again = xl.from_pretrained(tmp_path)  # with zero points, which this layout always has
    assert f"{OURS}.zero" in again.names("weight")
    assert difference(again(TOKENS), graph(TOKENS)) <= 1e-6


def test_act_order(tmp_path: Path) -> None:
    """Before: inputs that are not in the order of their groups. Expected: floats of the values that g_idx gives."""
    graph = quantized_graph(Case("gptq", "int4:g32"))
    graph.save_pretrained(tmp_path, layout="gptq")
    mixed = np.random.RandomState(1).permutation(np.repeat(np.arange(2), 32)).astype(np.int32)
    rewrite(tmp_path, lambda held: held.update({f"{KEY}.g_idx": mixed}))
    again = xl.from_pretrained(tmp_path)
    assert OURS in again.names("weight") and f"{OURS}.codes" not in again.names("weight")
    assert any(f"{KEY}.weight: groups" in note and "act-order" in note for note in again.history[0].notes)
    codes = decoded(graph) / np.repeat(scales_of(graph), 32, axis=1)
    np.testing.assert_allclose(np.asarray(again.weights[OURS]).T, codes * scales_of(graph)[:, mixed], rtol=1e-6)


@pytest.mark.breadth  # the program is that of the graph, which has its own tests
def test_serves_from_packed_weights(tmp_path: Path) -> None:
    """A program compiled from a directory has the tokens of one compiled from the graph that was written."""
    graph = quantized_graph(Case("gptq", "int4:g32"))
    graph.save_pretrained(tmp_path, layout="gptq")
    made = [xl.compile(g, max_batch=2, max_len=32).generate(TOKENS[:, :8], max_tokens=6) for g in
            (graph, xl.from_pretrained(tmp_path))]  # fmt: skip
    assert [row.tokens for row in made[0]] == [row.tokens for row in made[1]]


def test_from_one_layout_to_another(tmp_path: Path) -> None:
    quantized_graph(Case("gptq", "int4:g32")).save_pretrained(tmp_path / "a", layout="gptq")
    xl.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", layout="compressed-tensors")
    assert same(xl.from_pretrained(tmp_path / "a"), xl.from_pretrained(tmp_path / "b"))


def test_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before: a checkpoint of floats. Expected: `opt` writes a layout, and `inspect` and `convert` read it."""
    float_graph().save_pretrained(tmp_path / "a")
    words = [
        "opt",
        tmp_path / "a",
        tmp_path / "b",
        '--passes=quantize{scheme="int4:g32",weights="layers/.*"}',
        "--layout",
    ]
    assert main([str(word) for word in [*words, "gtpq"]]) == 1
    assert "no layout 'gtpq'; did you mean 'gptq'?" in capsys.readouterr().err
    assert main([str(word) for word in [*words, "gptq"]]) == 0
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "14 weight" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--type=F32"]) == 0
    floats, packed = (xl.from_pretrained(tmp_path / folder) for folder in "cb")
    assert difference(floats(TOKENS), packed(TOKENS)) <= 1e-5


def decoded(graph: xl.Graph) -> np.ndarray:
    """Returns the key projection of layer 1, float32 [n, k], by NumPy: the first of two codes in the low half."""
    codes = np.asarray(graph.weights[f"{OURS}.codes"])
    levels = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.float32)
    zero = np.asarray(graph.weights[f"{OURS}.zero"]) if f"{OURS}.zero" in graph.names("weight") else np.full((32, 2), 8)
    return (levels - np.repeat(zero, 32, axis=1)) * np.repeat(scales_of(graph), 32, axis=1)  # type: ignore[no-any-return]


def scales_of(graph: xl.Graph) -> np.ndarray:
    return np.asarray(graph.weights[f"{OURS}.scale"]).astype(np.float32)


def tensor(folder: Path, name: str) -> np.ndarray:
    return read_safetensors(folder / "model.safetensors")[name].read()
