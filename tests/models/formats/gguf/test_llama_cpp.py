"""GGUF files that we write, run by llama.cpp: what our forwards compute, which are compared with transformers.

Needs `pip install .[llama]`, which compiles llama.cpp. Weights and its cache are float32.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.models.formats import families
from tests.models.formats.gguf.quantized_cases import MODELS
from tests.models.tiny import tiny_checkpoint
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.pretrained import from_pretrained

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install .[llama]"
)
F32 = 0  # ggml's type of the cache
FAMILIES = [name for name in families.FAMILIES if name not in ("bert", "mistral-window")]
# ggml looks GELU up in a table of float16, which rounds twice, argument and result: a unit in the last place
TABLE = ("gemma2", "gemma3", "gpt2", "gpt-neox")
TABLE_RTOL = 2**-10


def opened(family: str, folder: Path, **options):
    """Returns llama.cpp's model of a family, and what was computed from it."""
    from llama_cpp import Llama

    checkpoint = families.load(family)
    path = folder / "m.gguf"
    write_gguf(checkpoint, path, "F32")
    common = {
        "n_ctx": 64,
        "n_batch": 64,
        "n_ubatch": 64,
        "n_threads": 1,
        "type_k": F32,
        "type_v": F32,
        "verbose": False,
    }
    return Llama(str(path), **common, **options), families.compute(checkpoint)


def check_logits(family, found, expected):
    """Expected: each number to 1e-5 of the largest; where numbers went through a table, all of them by their norm."""
    if family in TABLE:
        assert np.linalg.norm(found - expected) <= TABLE_RTOL * np.linalg.norm(expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_logits_and_text(family, tmp_path):
    model, expected = opened(family, tmp_path, logits_all=True)
    for row, logits in zip(expected["input_ids"], expected["logits"], strict=True):
        model.reset()
        model.eval(row.tolist())
        check_logits(family, model.scores[: len(row)], logits)

    greedy = expected["greedy"].tolist()
    found = greedy[:24]
    model.reset()
    model.eval(found)
    while len(found) < len(greedy):
        found.append(int(np.argmax(model.scores[len(found) - 1])))
        model.eval(found[-1:])
    assert found == greedy


def test_llama_cpp_agrees_within_the_window_that_it_does_not_know(tmp_path):
    """Its llama architecture has no sliding window: the 8 tokens of Mistral's first window are the same."""
    model, expected = opened("mistral-window", tmp_path, logits_all=True)
    model.eval(expected["input_ids"][0].tolist())
    logits = expected["logits"][0]
    atol = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(model.scores[:8], logits[:8], rtol=0, atol=atol)
    assert np.abs(model.scores[8:24] - logits[8:]).max() > 100 * atol


@pytest.mark.parametrize("type", ["Q8_0", "F16", "BF16"])
def test_llama_cpp_reads_the_numbers_that_we_read_from_other_types(type, tmp_path):
    """Before: a file of codes. Expected: the logits of a float32 file with the numbers that we decode from them."""
    from llama_cpp import Llama

    checkpoint = families.load("qwen3")
    expected = families.compute(checkpoint)
    write_gguf(checkpoint, tmp_path / "codes.gguf", type)
    write_gguf(read_gguf(tmp_path / "codes.gguf"), tmp_path / "decoded.gguf", "F32")
    logits = []
    for name in ("codes", "decoded"):
        model = Llama(str(tmp_path / f"{name}.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        model.eval(expected["input_ids"][0].tolist())
        logits.append(model.scores[:24].copy())
    # only activations differ, which llama.cpp rounds as the weights are; other codes would give unrelated logits
    cosine = (logits[0] * logits[1]).sum(-1) / np.linalg.norm(logits[0], axis=-1) / np.linalg.norm(logits[1], axis=-1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("type", ["Q4_K_M", "Q6_K"])
def test_llama_cpp_from_the_same_blocks(type, tmp_path):
    """Expected: our logits from its blocks are those of their numbers; with activations rounded as llama.cpp rounds
    them they are nearer to its logits, from which they differ where one of the two rounds a tie the other way."""
    from llama_cpp import Llama

    path = tmp_path / "m.gguf"
    write_gguf(tiny_checkpoint(MODELS["own"] | {"num_hidden_layers": 4, "num_key_value_heads": 2}), path, type)
    ids = np.random.default_rng(0).integers(0, 64, 24, dtype=np.int32)
    model = Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, type_k=F32, type_v=F32, verbose=False)
    model.eval(ids.tolist())
    floats, blocks, rounded = (
        np.asarray(from_pretrained(path, max_len=32, **options)(ids[None]))[0]
        for options in ({"packed": False}, {}, {"activations": "int8"})
    )
    far, near = (np.linalg.norm(found - model.scores[:24]) for found in (floats, rounded))
    assert np.abs(blocks - floats).max() <= 1e-5 * np.abs(floats).max()
    assert near <= 0.75 * far and near <= 0.03 * np.linalg.norm(floats)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe"])
@pytest.mark.parametrize("ftype", ["F16", "Q8_0", "Q4_0"])
def test_what_llama_cpp_writes_is_read(family, ftype, tmp_path):
    """Before: llama.cpp's own file. Expected: its settings are those we wrote, and with the numbers that we decode
    from it our forward computes what llama.cpp does with these numbers in float32."""
    import llama_cpp

    ours, theirs, decoded = (tmp_path / f"{name}.gguf" for name in ("ours", "theirs", "decoded"))
    write_gguf(families.load(family), ours, "F32")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}"), 1
    assert llama_cpp.llama_model_quantize(bytes(ours), bytes(theirs), options) == 0

    found = read_gguf(theirs)
    assert found.card.config == read_gguf(ours).card.config
    expected = families.compute(found)
    write_gguf(found, decoded, "F32")
    model = llama_cpp.Llama(str(decoded), n_ctx=64, n_threads=1, logits_all=True, type_k=F32, type_v=F32, verbose=False)
    model.eval(expected["input_ids"][0].tolist())
    check_logits(family, model.scores[:24], expected["logits"][0])


def test_llama_cpp_computes_bert_s_hidden_states(tmp_path):
    import llama_cpp

    model, expected = opened("bert", tmp_path, embedding=True, pooling_type=0)
    for row, states in zip(expected["input_ids"], expected["last_hidden_state"], strict=True):
        model._batch.reset()
        model._batch.add_sequence(row.tolist(), 0, True)
        model._ctx.decode(model._batch)
        pointers = [llama_cpp.llama_get_embeddings_ith(model._ctx.ctx, i) for i in range(len(row))]
        found = np.stack([np.ctypeslib.as_array(pointer, states.shape[1:]).copy() for pointer in pointers])
        np.testing.assert_allclose(found, states, rtol=0, atol=1e-3 * np.abs(states).max())
