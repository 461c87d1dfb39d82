"""Rotary settings to keys and tensors and back; factors against the definition of Llama 3.1's scaling, step by step."""

import math

import numpy as np
import pytest

from tests.models.formats import families
from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.container import open_container

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def written(path, family: str, **change):
    given = families.load(family)
    arrays = {name: tensor.read() for name, tensor in given.tensors.items()}
    write_gguf(families.of_arrays({**given.card.config, **change}, arrays), path / "m.gguf", "F32")
    return open_container(path / "m.gguf"), read_gguf(path / "m.gguf").card.config


def test_llama3_factors_are_those_of_the_definition(tmp_path):
    container, config = written(tmp_path, "llama", rope_parameters=LLAMA3)
    expected = []
    for i in range(0, 16, 2):
        wave = 2 * math.pi * 500000.0 ** (i / 16)
        if wave < 8192 / 4:
            expected.append(1.0)
        elif wave > 8192 / 1:
            expected.append(32.0)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 32 + smooth))
    found = as_tensor(container, container.entries["rope_freqs.weight"]).read()
    assert 1 < expected[4] < 32  # there is one between
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert config["rope_parameters"] == LLAMA3
    assert container.metadata["llama.rope.freq_base"] == 500000


def test_older_configs_say_the_same(tmp_path):
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    _, config = written(tmp_path, "llama", rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    assert config["rope_parameters"] == LLAMA3


def test_factors_of_no_known_settings_come_back_as_a_table(tmp_path):
    odd = {**LLAMA3, "high_freq_factor": 5.0}
    container, config = written(tmp_path, "llama", rope_parameters=odd)
    factors = as_tensor(container, container.entries["rope_freqs.weight"]).read().tolist()
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["attention_factor"]) == ("longrope", 1.0)
    assert rope["long_factor"] == rope["short_factor"] == factors


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
         "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
    ],
)  # fmt: skip
def test_scaling_comes_back(rope, tmp_path):
    container, config = written(tmp_path, "qwen3", rope_parameters=rope)
    assert container.metadata["qwen3.rope.scaling.type"] == rope["rope_type"]
    assert container.metadata["qwen3.rope.scaling.factor"] == rope["factor"]
    assert config["rope_parameters"] == rope


def test_deepseek_s_yarn_has_its_scale_of_scores(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    container, config = written(tmp_path, "deepseek-v3", rope_parameters=rope)
    assert container.metadata["deepseek2.rope.scaling.yarn_log_multiplier"] == np.float32(0.1)
    assert config["rope_parameters"] == rope


def test_phi3_s_longrope_comes_back(tmp_path):
    short, long = (np.linspace(1, top, 8).astype(np.float32).tolist() for top in (2, 30))
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    changed = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    container, config = written(tmp_path, "phi3", rope_parameters=rope, **changed)
    attention = math.sqrt(1 + math.log(8) / math.log(64))  # LongRoPE, and transformers' Phi3RotaryEmbedding
    assert container.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(attention, rel=1e-6)
    found = config["rope_parameters"]
    assert {**found, "attention_factor": 0} == {
        **rope, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64, "attention_factor": 0,
    }  # fmt: skip


def test_gemma3_s_two_bases_and_partial_rotation_come_back(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    container, config = written(tmp_path, "gemma3", rope_parameters=rope)
    assert container.metadata["gemma3.rope.freq_base_swa"] == 20000
    assert config["rope_parameters"] == rope
    container, config = written(tmp_path, "gpt-neox")
    assert container.metadata["gptneox.rope.dimension_count"] == 4
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_factors_of_the_wrong_number_are_refused(tmp_path):
    short = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}
    with pytest.raises(CheckpointError, match=r"rope_factors_long.*expected the shape \[8\], found \[1\]"):
        written(tmp_path, "phi3", rope_parameters=short)
