"""The verbs that open checkpoints, on every family: a directory, and the GGUF file that is made of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.models.formats import families
from tests.models.formats.test_tokenizers import MADE
from tests.models.tiny import tiny_checkpoint
from tests.tools.test_verbs import run
from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.huggingface import write_huggingface
from xlathe.models.pretrained import from_pretrained

PROMPT, NEW = "The fox", 6
LENGTH = {"max_position_embeddings": 64, "n_positions": 64}


def written(family: str, folder: Path) -> Path:
    """Writes a checkpoint that speaks: its vocabulary is a tokenizer's, and no token ends a text."""
    tokenizer = MADE["qwen2"]()
    config = json.loads((families.CONFIGS / f"{family}.json").read_text())
    config |= {name: size for name, size in LENGTH.items() if name in config}
    config |= {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": None, "eos_token_id": None}
    tensors = tiny_checkpoint(config).tensors
    write_huggingface(Checkpoint(Card(config), tensors, "test", tokenizer), folder)
    return folder


def continued(folder: Path) -> str:
    """Returns what follows the prompt by whole forwards, with no cache and nothing compiled for serving."""
    graph = from_pretrained(folder)
    assert graph.tokenizer is not None
    prompt = graph.tokenizer.encode(PROMPT).ids
    text = np.pad([prompt], ((0, 0), (0, NEW)))  # of one length: what comes later changes nothing, and compiles once
    for i in range(len(prompt), text.shape[1]):
        text[0, i] = np.asarray(graph(text))[0, i - 1].argmax()
    return graph.tokenizer.decode(text[0, len(prompt) :].tolist())


@pytest.mark.breadth
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name != "bert"])
def test_convert_inspect_and_generate(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = written(family, tmp_path / family), tmp_path / f"{family}.gguf"
    assert run(capsys, "convert", folder, file, "--type=F32").splitlines()[-1].startswith(f"{file}: ")
    assert run(capsys, "generate", file, PROMPT, f"--max_tokens={NEW}") == continued(folder) + "\n"
    reports = [run(capsys, "inspect", source) for source in (folder, file)]
    assert reports[0] == reports[1]


def test_an_encoder_is_converted_and_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = written("bert", tmp_path / "bert"), tmp_path / "bert.gguf"
    run(capsys, "convert", folder, file, "--type=F32")
    assert run(capsys, "inspect", folder) == run(capsys, "inspect", file)
