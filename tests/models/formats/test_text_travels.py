"""A checkpoint's tokenizer, special tokens and chat template go with it from one format to another."""

from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.models.formats.test_tokenizers import CORPUS, MADE
from tests.models.tiny import LLAMA, tiny_checkpoint
from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.formats.huggingface import read_huggingface, write_huggingface

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"


def spoken(made: str) -> Checkpoint:
    tokenizer = MADE[made]()
    config = {**LLAMA, "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 1}
    card = Card(config, {}, TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
    plain = tiny_checkpoint(config)
    return Checkpoint(card, plain.tensors, plain.where, tokenizer)


@pytest.mark.parametrize("made", ["llama", "llama-bpe", "qwen2"])
def test_from_a_directory_to_gguf_and_back(made: str, tmp_path: Path) -> None:
    given = spoken(made)
    write_huggingface(given, tmp_path / "first")
    first = read_huggingface(tmp_path / "first")
    write_gguf(first, tmp_path / "m.gguf", "F32")
    second = read_gguf(tmp_path / "m.gguf")
    write_huggingface(second, tmp_path / "third")
    third = read_huggingface(tmp_path / "third")
    for found in (first, second, third):
        assert found.card.chat_template == TEMPLATE
        assert found.card.stop_tokens == (1,)
        for text in CORPUS:
            assert found.tokenizer.encode(text).ids == given.tokenizer.encode(text).ids
    assert first.card.special_tokens == given.card.special_tokens


def test_a_pretrained_model_chats(tmp_path: Path) -> None:
    """Expected: of the file, of a saved graph and of a bundle the same answer, begun by one `<s>`."""
    write_gguf(spoken("llama"), tmp_path / "m.gguf", "F32")
    graph = xl.from_pretrained(tmp_path / "m.gguf", max_len=32)
    program = xl.compile(graph, chunks=(16,))
    messages = [{"role": "user", "content": "The fox"}]
    (expected,) = program.generate("<s>The fox<|turn|>", max_tokens=6)
    assert program.stop_tokens == (1,)
    assert program.chat(messages, 6).tokens == expected.tokens
    assert expected.stats.prompt_tokens == len(graph.tokenizer.encode("<s>The fox<|turn|>").ids) - 1
    (plain,) = program.generate("The fox", max_tokens=1)
    assert plain.stats.prompt_tokens == len(graph.tokenizer.encode("The fox").ids)
    graph.save(tmp_path / "graph")
    program.save(tmp_path / "bundle")
    loaded = xl.load_graph(tmp_path / "graph")
    assert loaded.card == graph.card
    assert xl.load(tmp_path / "bundle").chat(messages, 6).tokens == expected.tokens
    np.testing.assert_array_equal(loaded([[1, 2]]), graph([[1, 2]]))


KINDS = ["llama", "llama-bpe", "qwen2", "gpt-2", "gpt-4o", "deepseek-v3", "default", "tekken", "falcon", "bert"]


@pytest.mark.parametrize("made", KINDS)
def test_llama_cpp_gives_the_same_ids(made: str, tmp_path: Path) -> None:
    """llama.cpp reads the vocabulary alone of the file that we write."""
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install xlathe[llama]")
    given = spoken(made)
    write_gguf(given, tmp_path / "m.gguf", "F32")
    theirs = library.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    spaces = ["  two  spaces ", "\n\n\tx\r\n", "e\u0301 \u00a0 x"]
    texts = [*CORPUS, *spaces, "a<|turn|>b", "I'LL they'Re 1234567", "漢字かな😀"]
    for text in texts:
        found = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert found == given.tokenizer.encode(text).ids, text
