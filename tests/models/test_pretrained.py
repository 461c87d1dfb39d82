"""Graphs of checkpoints: dtypes, names, refusals. The numbers of each family are in tests/models/parity."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import xlathe as xl
from tests.models.tiny import LLAMA, tiny_checkpoint, write_tiny
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.huggingface import write_huggingface

TOKENS = np.arange(20).reshape(2, 10) % 61


def changed(folder: Path, tensors: dict[str, Tensor]) -> Path:
    made = tiny_checkpoint()
    write_huggingface(Checkpoint(made.card, {**made.tensors, **tensors}, "test"), folder)
    return folder


def array(value: Any) -> Tensor:
    return Tensor(value.shape, value.dtype, lambda: value)


def test_dtype_is_the_files_own_or_asked_for(tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype=ml_dtypes.bfloat16)
    kept, wide = xl.from_pretrained(tmp_path), xl.from_pretrained(tmp_path, dtype="float32")
    name = "layers/0/attention/query/kernel"
    assert kept.aval(name).dtype == ml_dtypes.bfloat16 and wide.aval(name).dtype == np.float32
    np.testing.assert_array_equal(kept.weights[name].astype(np.float32), wide.weights[name])
    assert np.abs(kept(TOKENS) - wide(TOKENS)).max() < 0.1 * np.abs(wide(TOKENS)).max()


def test_weights_stay_on_disk(tmp_path: Path) -> None:
    graph = xl.from_pretrained(write_tiny(tmp_path))
    assert not graph.weights["layers/2/feed_forward/down/kernel"].flags.owndata


def test_longest_text(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    assert xl.from_pretrained(tmp_path).max_len == 64 and xl.from_pretrained(tmp_path, max_len=16).max_len == 16
    with pytest.raises(xl.OptionError, match=r"max_len=65: .* has 64 positions"):
        xl.from_pretrained(tmp_path, max_len=65)


def test_names_without_the_model_around_them(tmp_path: Path) -> None:
    """Before: model.layers.0... Expected: layers.0... is read alike, as base models are saved."""
    made = tiny_checkpoint(LLAMA | {"tie_word_embeddings": True})
    short = {name.removeprefix("model."): tensor for name, tensor in made.tensors.items()}
    write_huggingface(made, tmp_path / "long")
    write_huggingface(Checkpoint(made.card, short, "test"), tmp_path / "short")
    long, brief = (xl.from_pretrained(tmp_path / folder) for folder in ("long", "short"))
    np.testing.assert_array_equal(long(TOKENS), brief(TOKENS))


def test_a_copy_of_a_tied_matrix_is_no_surplus(tmp_path: Path) -> None:
    made = tiny_checkpoint(LLAMA | {"tie_word_embeddings": True})
    copy = {"lm_head.weight": made.tensors["model.embed_tokens.weight"]}
    write_huggingface(Checkpoint(made.card, {**made.tensors, **copy}, "test"), tmp_path)
    assert "head/kernel" not in xl.from_pretrained(tmp_path).names("weight")


def test_missing_surplus_and_misshapen_tensors(tmp_path: Path) -> None:
    made = tiny_checkpoint()
    name = "model.layers.1.mlp.up_proj.weight"
    write_huggingface(
        Checkpoint(made.card, {k: v for k, v in made.tensors.items() if k != name}, "test"), tmp_path / "less"
    )
    with pytest.raises(xl.CheckpointError, match=rf"less has no tensor '{name}' \[32, 48\]"):
        xl.from_pretrained(tmp_path / "less")
    with pytest.raises(xl.CheckpointError, match=r"'model\.extra': no part of a LlamaForCausalLM"):
        xl.from_pretrained(changed(tmp_path / "more", {"model.extra": array(np.zeros(3, np.float32))}))
    with pytest.raises(xl.CheckpointError, match=rf"'{name}': expected \[48, 32\] .* found \[48, 31\]"):
        xl.from_pretrained(changed(tmp_path / "other", {name: array(np.zeros((48, 31), np.float32))}))


def test_nan_is_refused_where_it_is_read_unless_allowed(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = np.ones((48, 32), np.float32)
    bad[3, 4] = np.nan
    changed(tmp_path, {name: array(bad)})
    with pytest.raises(xl.CheckpointError, match=f"'{name}' holds 1 numbers that are NaN or infinite"):
        xl.from_pretrained(tmp_path)(TOKENS)
    assert np.isnan(xl.from_pretrained(tmp_path, allow_nan=True)(TOKENS)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "no family for model_type 'lama'; did you mean 'llama'"),
        ({"model_type": None}, "no family for model_type None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size: expected a whole number from 1 to 16777216, found '32'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4 heads, found 3"),
        ({"hidden_act": "gelou"}, "hidden_act: expected one of .*, found 'gelou'"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type: expected one of .*, found 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, found 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a positive number, found -1"),
    ],
)
def test_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_tiny(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(xl.CheckpointError, match=message) as raised:
        xl.from_pretrained(tmp_path)
    assert "config.json" in str(raised.value)


def test_options(tmp_path: Path) -> None:
    with pytest.raises(xl.OptionError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        xl.from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(xl.CheckpointError, match="nowhere does not exist"):
        xl.from_pretrained(tmp_path / "nowhere")
