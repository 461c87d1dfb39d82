"""Directories as transformers writes them: one file or shards, and what is wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.models.tiny import GEMMA2, LLAMA, tiny_checkpoint, write_tiny
from xlathe.errors import CheckpointError
from xlathe.models.formats.huggingface import read_huggingface, write_huggingface
from xlathe.safetensors_file import write_safetensors


def test_shards(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    write_huggingface(checkpoint, tmp_path / "one")
    write_huggingface(checkpoint, tmp_path / "many", shard=20_000)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    one, many = (read_huggingface(tmp_path / folder) for folder in ("one", "many"))
    assert one.tensors.keys() == many.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.read(), many.tensors[name].read())


def test_writing_again_leaves_no_shards_behind(tmp_path: Path) -> None:
    write_huggingface(tiny_checkpoint(), tmp_path, shard=20_000)
    write_huggingface(tiny_checkpoint(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_huggingface(tiny_checkpoint(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_huggingface(tiny_checkpoint(GEMMA2), tmp_path, wrote=interrupt)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_of_another_checkpoint_stays(tmp_path: Path) -> None:
    """Before: a directory with a tokenizer, shards and settings of its texts. Expected: those of the new one alone."""
    for name in ("tokenizer.json", "generation_config.json", "model-00001-of-00002.safetensors", "merges.txt", "NOTES"):
        (tmp_path / name).write_text("old")
    write_huggingface(tiny_checkpoint(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"NOTES", "config.json", "model.safetensors"}


def interrupt(size: int) -> None:
    raise KeyboardInterrupt


def test_a_pickle_is_refused_with_the_conversion_to_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        read_huggingface(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        read_huggingface(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("[1]", "expected a JSON object, found list"), ("{", "no JSON")])
def test_malformed_config(tmp_path: Path, text: str, message: str) -> None:
    write_tiny(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../x"}, "'../x' is no file name"),
        ({"a": 3}, "expected an object of file names"),
        ({"a": "missing.safetensors"}, r"missing\.safetensors cannot be read"),
        ({"b": "x.safetensors"}, r"holds 'a': model\.safetensors\.index\.json does not list it"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "has no tensor 'b'"),
    ],
)
def test_malformed_index(tmp_path: Path, places: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    write_safetensors(tmp_path / "x.safetensors", {"a": next(iter(tiny_checkpoint().tensors.values()))})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=message):
        read_huggingface(tmp_path)
