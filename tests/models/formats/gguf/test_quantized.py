"""Files in llama.cpp's mixes: each tensor has the type and the bytes that `llama_model_quantize` gives it."""

import importlib.util
import json

import numpy as np
import pytest

from tests.models.formats import families
from tests.models.formats.gguf import quantized_cases
from tests.models.formats.gguf.make_quantized_expected import EXPECTED
from tests.models.formats.gguf.test_importance import write_imatrix
from xlathe.errors import CheckpointError
from xlathe.models.formats.convert import convert
from xlathe.models.formats.gguf import plan_gguf, read_gguf, write_gguf, write_plan
from xlathe.tools.main import main

HAS_PEER = importlib.util.find_spec("llama_cpp") is not None
DECODERS = [name for name in families.FAMILIES if name != "bert"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Float32 files of the models, and the importance of their matrices."""
    folder, made = tmp_path_factory.mktemp("sources"), {}
    for model in quantized_cases.MODELS:
        path = folder / f"{model}.gguf"
        write_gguf(quantized_cases.load(model), path, "F32")
        made[model] = path, quantized_cases.importance_of(path)
    return made


@pytest.mark.parametrize("model", quantized_cases.MODELS)
def test_files_are_those_of_llama_cpp(model, sources, tmp_path):
    """Expected: hashes of all types and bytes, recorded from llama.cpp, for every mix, with and without importance."""
    path, importance = sources[model]
    expected = json.loads(EXPECTED.read_text())["files"][model]
    found = {}
    for _, mix, weighed in (case for case in quantized_cases.cases() if case[0] == model):
        write_plan(plan_gguf(read_gguf(path), mix, importance=importance if weighed else None), tmp_path / "m.gguf")
        found[mix + (" importance" if weighed else "")] = quantized_cases.digest(tmp_path / "m.gguf")
    assert found == expected


@pytest.mark.skipif(not HAS_PEER, reason="llama-cpp-python is not installed: pip install .[llama]")
@pytest.mark.parametrize("mix", quantized_cases.WRITTEN)
@pytest.mark.parametrize("family", DECODERS)
def test_files_of_every_family_are_those_of_llama_cpp_as_installed(family, mix, tmp_path):
    source = tmp_path / "source.gguf"
    write_gguf(quantized_cases.load(family), source, "F32")
    importance = quantized_cases.importance_of(source)
    for weights in (importance,) if mix == "Q2_K_S" else (None, importance):
        assert quantized_cases.llama_cpp(source, tmp_path / "peer.gguf", mix, weights) == 0
        write_plan(plan_gguf(read_gguf(source), mix, importance=weights), tmp_path / "m.gguf")
        found, expected = (quantized_cases.contents(tmp_path / name) for name in ("m.gguf", "peer.gguf"))
        assert {name: type for name, (type, _) in found.items()} == {n: type for n, (type, _) in expected.items()}
        assert [name for name in expected if found[name] != expected[name]] == []


def test_the_command_prints_the_plan_and_writes_it(tmp_path, capsys):
    write_gguf(quantized_cases.load("narrow"), tmp_path / "a.gguf", "F32")
    sums = quantized_cases.importance_of(tmp_path / "a.gguf")
    write_imatrix(tmp_path / "i.gguf", sums, {name: [1] * len(array) for name, array in sums.items()})
    words = [str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--type=Q4_K_S", f"--imatrix={tmp_path / 'i.gguf'}"]
    assert main(["convert", *words]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["blk.0.ffn_down.weight"][-4:] == ["Q5_0*", "5.5000", "61,440", "10,560"]
    assert lines["token_embd.weight"][-4:] == ["Q5_0", "5.5000", "24,576", "4,224"]
    found = quantized_cases.contents(tmp_path / "b.gguf")
    assert lines["all"][-1] == f"{sum(len(data) for _, data in found.values()):,}"
    write_plan(plan_gguf(read_gguf(tmp_path / "a.gguf"), "Q4_K_S", importance=sums), tmp_path / "c.gguf")
    assert found == quantized_cases.contents(tmp_path / "c.gguf")


def test_q2_k_s_needs_importance(sources):
    path, _ = sources["shared"]
    with pytest.raises(CheckpointError, match=r"'blk.0.*expected its importance .*Q2_K does without"):
        plan_gguf(read_gguf(path), "Q2_K_S")


@pytest.mark.parametrize(
    ("number", "message"), [(np.nan, "numbers, found NaN"), (1e30, "numbers that fit Q4_K, found larger")]
)
def test_numbers_that_no_block_holds_are_refused_by_name_and_nothing_is_left(number, message, tmp_path):
    checkpoint = quantized_cases.load("own")
    arrays = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    arrays["model.layers.3.mlp.up_proj.weight"][7, 5] = number
    source = families.of_arrays(checkpoint.card.config, arrays)
    if np.isnan(number):
        with pytest.raises(CheckpointError, match=rf"'blk.3.ffn_up.weight': expected {message}"):
            write_gguf(source, tmp_path / "m.gguf", "F32")
        assert not list(tmp_path.iterdir())
        return
    write_gguf(source, tmp_path / "source.gguf", "F32")
    if HAS_PEER:
        assert quantized_cases.llama_cpp(tmp_path / "source.gguf", tmp_path / "peer.gguf", "Q4_K_S", None) != 0
        (tmp_path / "peer.gguf").unlink()
    with pytest.raises(CheckpointError, match=rf"'blk.3.ffn_up.weight': expected {message}"):
        convert(tmp_path / "source.gguf", tmp_path / "m.gguf", "Q4_K_S")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]
