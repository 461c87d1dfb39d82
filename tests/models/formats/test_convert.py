"""Checkpoints from one format to another, through the command line and from Python."""

import dataclasses
import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import xlathe as xl
from tests.models.formats.families import compute, load, of_arrays
from tests.models.formats.test_tokenizers import byte_level
from xlathe.errors import CheckpointError, OptionError
from xlathe.models.formats.checkpoints import open_checkpoint
from xlathe.models.formats.convert import convert
from xlathe.models.formats.gguf import write_gguf
from xlathe.models.formats.gguf.container import open_container
from xlathe.models.formats.huggingface import write_huggingface
from xlathe.tools.main import main

TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"<{i}>" for i in range(128)],
    "tokenizer.ggml.scores": np.zeros(128, np.float32),
    "tokenizer.ggml.token_type": np.ones(128, np.int32),
    "tokenizer.ggml.add_bos_token": True,
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_directory_becomes_a_gguf_file_and_a_directory_again(family, tmp_path, capsys):
    """Expected: numbers and logits of the first directory, also from the file in between."""
    given = load(family)
    expected = compute(given)
    write_huggingface(given, tmp_path / "source")
    source, file, back = (str(tmp_path / name) for name in ("source", "m.gguf", "back"))
    assert main(["convert", source, file, "--type=F32"]) == 0
    assert main(["convert", file, back]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "bytes of numbers" in out

    found = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert set(found) == set(given.tensors)
    for name, array in found.items():
        np.testing.assert_array_equal(array, given.tensors[name].read())
    for place in (file, back):
        graph = xl.from_pretrained(place, max_len=32)
        np.testing.assert_allclose(graph(expected["input_ids"]), expected["logits"], rtol=0, atol=2e-5)


def test_types_of_a_gguf_file_and_what_it_says_of_its_tokenizer(tmp_path):
    given = load("llama")
    expected = compute(given)
    write_gguf(given, tmp_path / "a.gguf", "F32", extra={**TOKENIZER, "general.name": "Tiny"})
    total = convert(tmp_path / "a.gguf", tmp_path / "b.gguf")
    container = open_container(tmp_path / "b.gguf")
    assert container.entries["output.weight"].type.name == "Q8_0"
    assert total == sum(entry.size for entry in container.entries.values())
    assert container.metadata["general.name"] == "Tiny"
    for key, value in TOKENIZER.items():
        np.testing.assert_array_equal(container.metadata[key], value)
    logits = xl.from_pretrained(tmp_path / "b.gguf")(expected["input_ids"])
    assert 0 < np.abs(logits - expected["logits"]).max() < 0.1 * np.abs(expected["logits"]).max()


def test_a_directory_gets_the_type_that_is_asked_for(tmp_path):
    given = load("llama")
    write_huggingface(given, tmp_path / "source")
    reported: list[tuple[int, int]] = []
    total = convert(tmp_path / "source", tmp_path / "half", "BF16", lambda *both: reported.append(both))
    assert reported[-1] == (total, total) and total == sum(t.read().size * 2 for t in given.tensors.values())
    found = open_checkpoint(tmp_path / "half")
    for name, tensor in given.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].read(), tensor.read().astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_wrong_types_and_places_are_refused(tmp_path, capsys):
    write_huggingface(load("llama"), tmp_path / "source")
    with pytest.raises(OptionError, match="no type 'Q4_K' to write; did you mean"):
        convert(tmp_path / "source", tmp_path / "m.gguf", "Q4_K")
    with pytest.raises(OptionError, match="no type 'Q8_0' in a directory"):
        convert(tmp_path / "source", tmp_path / "out", "Q8_0")
    with pytest.raises(CheckpointError, match="another place than the source"):
        convert(tmp_path / "source", tmp_path / "source")
    (tmp_path / "text.gguf").write_text("no checkpoint at all")
    assert main(["convert", str(tmp_path / "text.gguf"), str(tmp_path / "m.gguf")]) == 1
    assert "expected a GGUF file, which begins with" in capsys.readouterr().err


def test_a_tokenizer_with_fewer_tokens_than_the_embedding_has_rows(tmp_path):
    """Expected: a token a row, as llama.cpp wants it, and the tokenizer back."""
    given = load("llama")
    arrays = {name: tensor.read() for name, tensor in given.tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = np.resize(arrays[name], (512, 64))
    tokenizer = byte_level("llama-bpe")
    made = of_arrays({**given.card.config, "vocab_size": 512}, arrays)
    write_gguf(dataclasses.replace(made, tokenizer=tokenizer), tmp_path / "m.gguf", "F32")
    metadata = open_container(tmp_path / "m.gguf").metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    size = tokenizer.get_vocab_size()
    assert size < len(tokens) == len(kinds) == 512
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 512)] and set(kinds[size:]) == {5}
    found = open_checkpoint(tmp_path / "m.gguf").tokenizer
    assert found.encode("The fox  doesn't").ids == tokenizer.encode("The fox  doesn't").ids
    if importlib.util.find_spec("llama_cpp") is not None:
        model = importlib.import_module("llama_cpp").Llama(str(tmp_path / "m.gguf"), n_ctx=16, verbose=False)
        plain = tokenizer.encode("The fox  doesn't", add_special_tokens=False).ids
        assert model.tokenize(b"The fox  doesn't", add_bos=False) == plain


@pytest.mark.parametrize("destination", ["hf", "m.gguf"])
def test_numbers_that_are_none_are_refused_by_name(destination, tmp_path):
    given = load("llama")
    arrays = {name: tensor.read() for name, tensor in given.tensors.items()}
    arrays["model.norm.weight"][3] = np.nan
    write_huggingface(of_arrays(given.card.config, arrays), tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"norm\.weight': expected numbers, found NaN"):
        convert(tmp_path / "source", tmp_path / destination, "F32")
    assert not (tmp_path / "m.gguf").exists() and not list((tmp_path / "hf").glob("*"))
