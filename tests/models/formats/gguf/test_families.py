"""Each family to GGUF and back, its names and arrays as llama.cpp's own tables and formulas say."""

import gguf
import numpy as np
import pytest

from tests.models.formats import families
from tests.models.formats.families import FAMILIES
from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.formats.gguf.architectures import BY_MODEL_TYPE
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.container import open_container

# Settings of training, and what implies nothing for a forward pass.
UNSAID = {
    "architectures", "attention_dropout", "dtype", "initializer_range", "transformers_version", "use_cache",
    "pretraining_tp", "attn_pdrop", "embd_pdrop", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits", "hidden_dropout", "classifier_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "add_cross_attention", "max_window_layers", "use_bidirectional_attention",
    "_sliding_window_pattern", "num_nextn_predict_layers",
}  # fmt: skip


def is_said(family: str, key: str) -> bool:
    if key.startswith("summary_") or key in UNSAID:
        return False
    full_attention = family.startswith("qwen") and key in ("layer_types", "attention_bias")
    return not full_attention and (family, key) not in {("gpt-neox", "num_key_value_heads"), ("gpt-neox", "is_decoder")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_as_it_was(family, tmp_path):
    given = families.load(family)
    write_gguf(given, tmp_path / "m.gguf", "F32")
    found = read_gguf(tmp_path / "m.gguf")

    expected = {name: tensor.read() for name, tensor in given.tensors.items() if not name.startswith("pooler.")}
    assert set(found.tensors) == set(expected)
    for name, array in expected.items():
        tensor = found.tensors[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        # (w + 1) - 1 in float32 is w to half a unit in the last place of w + 1
        atol = 1.2e-7 if family.startswith("gemma") and name.endswith("norm.weight") else 0
        np.testing.assert_allclose(tensor.read(), array, rtol=0, atol=atol, err_msg=name)
    for key, value in given.card.config.items():
        if is_said(family, key):
            head_dim_of_none = key == "head_dim" and value is None
            assert head_dim_of_none or found.card.config.get(key) == value, key


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_llama_cpp_s_table(family, tmp_path):
    given = families.load(family)
    write_gguf(given, tmp_path / "m.gguf", "F32")
    found = set(open_container(tmp_path / "m.gguf").entries)

    name = BY_MODEL_TYPE[given.card.config["model_type"]].name
    (arch,) = [arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    table = gguf.get_tensor_name_map(arch, 8)
    expected = set()
    for hf in given.tensors:
        if hf.startswith("pooler."):
            continue
        if "kv_b_proj" in hf:  # the converter splits it
            expected |= {table.get_name(hf.replace("kv_b", part), (".weight",)) for part in ("k_b", "v_b")}
            continue
        parts = hf.split(".experts.")
        merged = f"{parts[0]}.experts.{parts[1].partition('.')[2]}" if len(parts) == 2 else hf
        if "block_sparse_moe.experts" in merged:
            merged = merged.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        expected.add(table.get_name(merged.replace("correction_bias", "correction.bias"), (".weight", ".bias")))
    assert found == expected


@pytest.mark.parametrize("type", ["Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "bert", "gpt2", "deepseek-v3"])
def test_norms_biases_routers_and_positions_stay_float32(family, type, tmp_path):
    given = families.load(family)
    write_gguf(given, tmp_path / "m.gguf", type)
    container = open_container(tmp_path / "m.gguf")
    assert container.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{type}"]
    for name, entry in container.entries.items():
        float32 = name.endswith((".bias", "_norm.weight", "ffn_gate_inp.weight", "position_embd.weight"))
        # rows of 16 latent features are half a block
        narrow = type == "Q8_0" and entry.shape[-1] % 32
        expected = "F32" if float32 or name == "token_types.weight" else "F16" if narrow else type
        assert entry.type.name == expected, name


def test_llama_s_rotary_rows_are_those_of_the_converter(tmp_path):
    given = families.load("llama")
    write_gguf(given, tmp_path / "m.gguf", "F32")
    container = open_container(tmp_path / "m.gguf")
    for part, heads in (("q", 4), ("k", 2)):
        weight = given.tensors[f"model.layers.1.self_attn.{part}_proj.weight"].read()
        half = weight.shape[0] // heads // 2
        rows = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in range(2)]
        found = as_tensor(container, container.entries[f"blk.1.attn_{part}.weight"]).read()
        np.testing.assert_array_equal(found, weight[rows])


def test_latent_up_projections_in_one_piece_are_read_too(tmp_path):
    """Files from before llama.cpp split them: attn_kv_b as Hugging Face has it, and sizes of plain attention."""
    given = families.load("deepseek-v3")
    write_gguf(given, tmp_path / "split.gguf", "F32")
    container = open_container(tmp_path / "split.gguf")
    writer = gguf.GGUFWriter(tmp_path / "fused.gguf", "deepseek2")
    for key, value in container.metadata.items():
        if key.startswith("deepseek2.") and "mla" not in key:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)]
            add(key, {"deepseek2.attention.key_length": 24, "deepseek2.attention.value_length": 16}.get(key, value))
    for name, entry in container.entries.items():
        if "attn_v_b" not in name and "attn_k_b" not in name:
            writer.add_tensor(name, as_tensor(container, entry).read())
    for b in range(3):
        kv_b = given.tensors[f"model.layers.{b}.self_attn.kv_b_proj.weight"].read()
        writer.add_tensor(f"blk.{b}.attn_kv_b.weight", kv_b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found, expected = read_gguf(tmp_path / "fused.gguf"), read_gguf(tmp_path / "split.gguf")
    tokens = {key: value for key, value in expected.card.config.items() if key.endswith("token_id")}
    assert {**found.card.config, **tokens} == expected.card.config
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].read(), tensor.read())


def test_names_without_the_model_s_prefix_are_known(tmp_path):
    given = families.load("gpt2")
    bare = {name.removeprefix("transformer."): tensor.read() for name, tensor in given.tensors.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 4, 4), np.float32))  # a buffer of old checkpoints
    write_gguf(families.of_arrays(given.card.config, bare), tmp_path / "m.gguf", "F32")
    assert set(read_gguf(tmp_path / "m.gguf").tensors) == set(given.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "no GGUF form of the model type 'lama'; did you mean 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: GGUF's llama expects 'silu', found 'gelu'"),
        ({"num_hidden_layers": None}, "expected 'num_hidden_layers', found none"),
        ({"num_attention_heads": 5}, "does not fit the config"),
        ({"num_hidden_layers": 2}, "tensor 'model.layers.2.* has no place"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "found 'dynamic'"),
    ],
)
def test_what_gguf_cannot_say_is_refused_and_nothing_is_left(change, message, tmp_path):
    given = families.load("llama")
    arrays = {name: tensor.read() for name, tensor in given.tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        write_gguf(families.of_arrays({**given.card.config, **change}, arrays), tmp_path / "m.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    given = families.load("llama")
    arrays = {name: tensor.read() for name, tensor in given.tensors.items()}
    arrays["lm_head.weight"] = np.full_like(arrays["lm_head.weight"], 1e6)  # written near the end of F16's
    path = tmp_path / "m.gguf"
    path.write_text("what was there")
    with pytest.raises(CheckpointError, match=r"'output\.weight': expected numbers that fit F16"):
        write_gguf(families.of_arrays(given.card.config, arrays), path, "F16")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"] and path.read_text() == "what was there"
