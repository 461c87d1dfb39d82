"""`xlathe eval`: its figures are those of NumPy written out, for a graph and for a bundle."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.models.formats.test_text_travels import spoken
from tests.models.formats.test_tokenizers import CORPUS
from xlathe.models.formats.gguf import write_gguf
from xlathe.models.formats.huggingface import write_huggingface
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
    """The numbers of every line of figures."""
    assert main(["eval", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [re.sub("top-1|99 %", "", line) for line in out.splitlines()[2:]]
    return [[float(x) for x in re.findall(r"-?\d[0-9.]*(?:e-?\d+)?", line)] for line in lines]


def log_probabilities(logits: object) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def predicted(graph: xl.Graph, length: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses [windows, scored], and log probabilities [windows, scored, vocab]."""
    ids = graph.tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    log_probs = log_probabilities(graph(windows))[:, first:-1]
    return -np.take_along_axis(log_probs, windows[:, first + 1 :, None], -1)[..., 0], log_probs


def test_whole_windows_of_a_graph_alone(tiny, tiny_folder, text, capsys):
    perplexity, bits = figures(capsys, tiny_folder, f"--text={text}", "--protocol=windows")
    losses, count = predicted(tiny, 32)[0].mean(1), len(tiny.tokenizer.encode(TEXT).ids)
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert perplexity == pytest.approx([np.exp(losses.mean()), np.exp(losses.mean()) * error], rel=0.05)
    assert perplexity[0] == pytest.approx(np.exp(losses.mean()), rel=1e-3)
    assert bits[0] == pytest.approx(losses.mean() / np.log(2) * count / len(TEXT.encode()), rel=1e-3)


def test_second_halves_of_a_bundle_beside_the_graph_it_came_from(
    tiny, quantized, tiny_folder, bundle, text, capsys, tmp_path
):
    """24 tokens fit the bundle: 11 of each window are scored."""
    words = (bundle, f"--text={text}", f"--reference={tiny_folder}", f"--json={tmp_path / 'figures.json'}")
    printed = figures(capsys, *words)
    found = json.loads((tmp_path / "figures.json").read_text())
    base, before = predicted(tiny, 24, first=12)
    losses, after = predicted(quantized, 24, first=12)
    kl = (np.exp(before) * (before - after)).sum(-1)
    delta = np.exp(-losses) - np.exp(-base)
    same = (before.argmax(-1) == after.argmax(-1)).mean()
    expected = {
        "perplexity": np.exp(losses.mean()),
        "base_perplexity": np.exp(base.mean()),
        "log_ratio": (losses - base).mean(),
        "kl": kl.mean(),
        "kl_median": np.median(kl),
        "kl_tail": np.quantile(kl, 0.99),
        "same_top1": same,
        "delta_p": delta.mean(),
        "delta_p_rms": np.sqrt((delta**2).mean()),
    }
    assert kl.mean() > 1e-7 and found["scored"] == losses.size == 11 * found["windows"]
    assert found["protocol"]["name"] == "llama.cpp" and found["protocol"]["context"] == 24
    for name, value in expected.items():
        assert found[name]["mean"] == pytest.approx(value, rel=0.01), name
    error = kl.std(ddof=1) / np.sqrt(kl.size)
    assert found["kl"]["error"] == pytest.approx(error, rel=0.01)
    perplexity, _, reference, ratio, mean, median, tail, top1, *changes = printed
    assert perplexity[0] == pytest.approx(expected["perplexity"], rel=1e-3)
    assert reference[0] == pytest.approx(expected["base_perplexity"], rel=1e-3)
    assert [mean[0], median[0], tail[0]] == pytest.approx([kl.mean(), np.median(kl), expected["kl_tail"]], rel=0.01)
    assert ratio[0] == pytest.approx(expected["log_ratio"], rel=0.01)
    assert top1[0] == pytest.approx(100 * same, rel=1e-3)
    assert [each[0] for each in changes] == pytest.approx([100 * delta.mean(), 100 * expected["delta_p_rms"]], rel=0.01)


def test_which_protocol_ran_is_told(tiny_folder, text, capsys):
    for name, told in {"llama.cpp": "tokens 18 to 32 of each scored", "windows": "tokens 2 to 32"}.items():
        assert main(["eval", str(tiny_folder), f"--text={text}", f"--protocol={name}"]) == 0
        assert f"protocol {name}: windows of 32 tokens, {told}" in capsys.readouterr().out


@pytest.mark.parametrize("made", ["llama", "gpt-2"])
def test_checkpoints_begin_their_windows_as_llama_cpp_does(made, tmp_path, capsys):
    """Of a directory and of a GGUF file; `llama` begins a text with <s>, `gpt-2` with nothing."""
    plain = spoken(made)
    card = dataclasses.replace(plain.card, config={**plain.card.config, "rms_norm_eps": 1e-6})  # llama.cpp wants one
    given = dataclasses.replace(plain, card=card)
    write_huggingface(given, tmp_path / "hf")
    write_gguf(given, tmp_path / "m.gguf", "F32")
    (tmp_path / "text").write_text(" ".join(CORPUS) * 4, encoding="utf-8")
    ids = given.tokenizer.encode((tmp_path / "text").read_text("utf-8")).ids
    graph = xl.from_pretrained(tmp_path / "hf")
    windows = np.asarray(ids[: len(ids) // 64 * 64], np.int32).reshape(-1, 64)
    if made == "llama":
        assert windows[0, 0] == given.tokenizer.token_to_id("<s>") != windows[1, 0]
        windows[:, 0] = windows[0, 0]
    losses = -np.take_along_axis(log_probabilities(graph(windows))[:, :-1], windows[:, 1:, None], -1)[:, 32:, 0]
    for source in ("hf", "m.gguf"):
        found = figures(capsys, tmp_path / source, f"--text={tmp_path / 'text'}")
        assert found[0][0] == pytest.approx(np.exp(losses.mean()), rel=1e-3)
    if importlib.util.find_spec("llama_cpp") is not None:
        theirs = importlib.import_module("llama_cpp").Llama(
            str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False
        )
        for window, expected in zip(windows, losses, strict=True):
            theirs.reset()
            theirs.eval(window.tolist())
            log_probs = log_probabilities(theirs.scores[32:63])
            np.testing.assert_allclose(-log_probs[np.arange(31), window[33:]], expected, rtol=1e-3)


def test_a_program_forced_along_tokens_gives_the_logits_of_its_graph(quantized, bundle):
    tokens = np.random.default_rng(3).integers(0, 4096, (1, 24), dtype=np.int32)
    found, expected = Forced(xl.load(bundle))(tokens), np.asarray(quantized(tokens))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "is no text in UTF-8"), (b"a", "the text has 1 tokens, expected at least 6"), (b"", "has 0 tokens")],
)
def test_texts_that_cannot_be_evaluated(tiny_folder, tmp_path, content, message, capsys):
    (tmp_path / "text").write_bytes(content)
    assert main(["eval", str(tiny_folder), f"--text={tmp_path / 'text'}"]) == 1
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_compared(tiny, tiny_folder, text, tmp_path, capsys):
    xl.trace(lambda p, ids: p["e"][ids] @ p["e"].T, {"e": np.ones((5, 2), np.float32)}, max_len=8).save(tmp_path / "g")
    assert main(["eval", str(tiny_folder), f"--text={text}", f"--reference={tmp_path / 'g'}"]) == 1
    assert "g has no tokenizer, which evaluating a text needs" in capsys.readouterr().err
