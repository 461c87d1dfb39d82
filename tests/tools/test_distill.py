"""`xlathe distill`: a student on disk, what is told of it, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import xlathe as xl
from tests.tools.conftest import TINY
from xlathe.models import demo
from xlathe.models.llama import Llama
from xlathe.tools.main import main

TEXT = "def read_file(path):\n    with open(path) as file:\n        return file.read()\n" * 8


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "graph"
    xl.trace(Llama(TINY, rngs=nnx.Rngs(1)), max_len=32, tokenizer=demo.tokenizer()).save(folder)
    return folder


def words(student: Path, teacher: Path, folder: Path, *more: str) -> list[str]:
    (folder / "text").write_text(TEXT)
    flags = [f"--teacher={teacher}", f"--text={folder / 'text'}", "--tokens=256", "--context=16", "--rows=2"]
    return ["distill", str(student), str(folder / "out"), *flags, *more]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_it_saves_a_student_that_is_closer(tiny, tiny_folder, teacher_folder, tmp_path, capsys):
    files = [f"--json={tmp_path / 'loss.json'}", f"--html={tmp_path / 'page.html'}"]
    assert main(words(tiny_folder, teacher_folder, tmp_path, *files)) == 0
    out = capsys.readouterr().out
    assert "step 8 of 8  loss" in out and "tokens/s" in out and "distill: 8 weight" not in out.splitlines()[0]
    told = json.loads((tmp_path / "loss.json").read_text())
    assert told["tokens_per_step"] == 32 and len(told["losses"]) == 8 and told["losses"][-1] < told["losses"][0]
    assert "<svg" in (tmp_path / "page.html").read_text()
    found, tokens = xl.load_graph(tmp_path / "out"), np.arange(12, dtype=np.int32)[None]
    assert found(tokens).shape == (1, 12, 4096) and not np.array_equal(found(tokens), tiny(tokens))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.json", "out", "page.html", "text"]


def test_a_teacher_on_disk_is_of_one_text_and_k(tiny_folder, teacher_folder, tmp_path, capsys):
    stored = tmp_path / "teacher"
    flags = ("--loss=top_k{k=8}", f"--teacher_logits={stored}", f"--json={tmp_path / 'loss.json'}", "--tokens=64")
    assert main(words(tiny_folder, teacher_folder, tmp_path, *flags)) == 0
    before = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    capsys.readouterr()
    flags = ("--loss=top_k{k=9}", *flags[1:])
    assert main(words(tiny_folder, teacher_folder, tmp_path, *flags)) == 1
    assert "k or the temperature differ" in error(capsys)
    assert {path.name: path.stat().st_mtime_ns for path in stored.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--teacher=/nowhere/at/all",), 1, "/nowhere/at/all"),
        (("--tokens=0",), 1, "tokens must be a positive whole number, got 0"),
        (("--rows=64",), 1, "expected more than the 1,024 tokens of one step (64 rows x 1 x 16), found"),
        (("--loss=forward_k",), 1, "did you mean 'forward_kl'"),
        (("--loss=jsd{beta=2.0}",), 1, "beta must be 0 (forward KL) to 1 (reverse KL)"),
        (("--loss=forward_kl", "--teacher_logits=x"), 2, "--teacher_logits holds what top_k reads"),
        (("--loss=features",), 1, "found no repeated layers in the student"),
        (("--context=0",), 1, "expected rows of at least 1 token, got a length of 0"),
        (("--seed=-1",), 1, "seed must be a whole number of at least 0, got -1"),
        (("--on_policy=1.5",), 1, "on_policy must be a fraction of 0 to 1, got 1.5"),
        (("--loss=top_k", "--teacher_logits=x", "--shared_vocab"), 2, "leave out --teacher_logits"),
        (("--html=/nowhere/page.html",), 2, "expected a file in a folder that exists"),
    ],
)
def test_what_is_refused(more, code, message, tiny_folder, teacher_folder, tmp_path, capsys):
    assert main(words(tiny_folder, teacher_folder, tmp_path, *more)) == code
    assert message in error(capsys)
    assert not (tmp_path / "out").exists()


def test_no_teacher_no_text_and_no_length(tiny_folder, tmp_path, capsys):
    line = ["distill", str(tiny_folder), str(tmp_path / "out")]
    assert main(line) == 2 and "for how long? --tokens=N" in error(capsys)
    assert main([*line, "--tokens=64"]) == 2 and "which teacher? --teacher=MODEL" in error(capsys)
    assert main([*line, "--tokens=64", "--loss=cross_entropy"]) == 2 and "which text? --text=FILE" in error(capsys)
