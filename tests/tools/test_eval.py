"""`xlathe eval`: its figures are those of NumPy written out, for a graph and for a bundle."""

import re
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from xlathe.passes import Canonicalize, FuseAttention, Quantize
from xlathe.tools.forced import Forced
from xlathe.tools.main import main

TEXT = "def read_file(path):\n    with open(path) as file:\n        return file.read()  # naïve\n" * 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(tiny: xl.Graph) -> xl.Graph:
    return Quantize()(FuseAttention()(Canonicalize()(tiny)))


@pytest.fixture(scope="module")
def bundle(quantized: xl.Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "int8"
    xl.compile(quantized, max_len=24, chunks=(16,)).save(folder)
    return folder


def figures(capsys: pytest.CaptureFixture[str], *words: object) -> list[list[float]]:
    """The numbers of every line but the first."""
    assert main(["eval", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [[float(x) for x in re.findall(r"(?<![\w-])[0-9.]+(?:e-?\d+)?", line)] for line in out.splitlines()[1:]]


def log_probabilities(logits: object) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_losses(graph: xl.Graph, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    ids = graph.tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    log_probs = log_probabilities(graph(windows))
    losses = -np.take_along_axis(log_probs[:, :-1], windows[:, 1:, None], -1).mean((1, 2))
    return losses, log_probs, len(ids)


def test_a_graph_alone(tiny, tiny_folder, text, capsys):
    perplexity, bits = figures(capsys, tiny_folder, f"--text={text}")
    losses, _, count = expected_losses(tiny, 32)
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert perplexity == pytest.approx([np.exp(losses.mean()), np.exp(losses.mean()) * error], rel=0.05)
    assert perplexity[0] == pytest.approx(np.exp(losses.mean()), rel=1e-3)
    assert bits[0] == pytest.approx(losses.mean() / np.log(2) * count / len(TEXT.encode()), rel=1e-3)


def test_a_bundle_against_the_graph_it_came_from(tiny, quantized, tiny_folder, bundle, text, capsys):
    perplexity, _, kl, same = figures(capsys, bundle, f"--text={text}", f"--reference={tiny_folder}")
    losses, after, _ = expected_losses(quantized, 24)
    before = expected_losses(tiny, 24)[1]
    divergence = (np.exp(before) * (before - after)).sum(-1).mean()
    assert perplexity[0] == pytest.approx(np.exp(losses.mean()), rel=1e-3)
    assert kl[0] == pytest.approx(divergence, rel=0.01) and divergence > 1e-7
    assert same[0] == pytest.approx((before.argmax(-1) == after.argmax(-1)).mean(), abs=1e-3)


def test_a_program_forced_along_tokens_gives_the_logits_of_its_graph(quantized, bundle):
    tokens = np.random.default_rng(3).integers(0, 4096, (1, 24), dtype=np.int32)
    found, expected = Forced(xl.load(bundle))(tokens), np.asarray(quantized(tokens))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "is no text in UTF-8"), (b"a", "the text has 1 tokens, expected at least 4"), (b"", "has 0 tokens")],
)
def test_texts_that_cannot_be_evaluated(tiny_folder, tmp_path, content, message, capsys):
    (tmp_path / "text").write_bytes(content)
    assert main(["eval", str(tiny_folder), f"--text={tmp_path / 'text'}"]) == 1
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_compared(tiny, tiny_folder, text, tmp_path, capsys):
    xl.trace(lambda p, ids: p["e"][ids] @ p["e"].T, {"e": np.ones((5, 2), np.float32)}, max_len=8).save(tmp_path / "g")
    assert main(["eval", str(tiny_folder), f"--text={text}", f"--reference={tmp_path / 'g'}"]) == 1
    assert "g has no tokenizer, which evaluating a text needs" in capsys.readouterr().err
