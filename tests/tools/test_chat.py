"""A conversation on the command line: as `Program.chat` answers it, also from a bundle and without Flax."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import xlathe as xl
import xlathe.program
from xlathe.card import Card
from xlathe.program import Piece, Program
from xlathe.tools.main import main

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
CARD = Card({"eos_token_id": [0, -1, 99_999]}, chat_template=TEMPLATE)
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def program(tiny: xl.Graph) -> Program:
    return xl.compile(tiny.replace(card=CARD), chunks=(16,))


@pytest.fixture(scope="module")
def bundle(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "chat"
    program.save(folder)
    return folder


def test_a_chat_is_its_template_generated(program: Program) -> None:
    assert program.stop_tokens == (0,) and program.card == CARD
    ids = program.tokenizer.encode("u:hi\na:").ids
    (expected,) = program.generate([ids], max_tokens=8, temperature=1.0, seed=3)
    found = program.chat(QUESTION, 8, temperature=1.0, seed=3)
    assert (found.tokens, found.text) == (expected.tokens, expected.text)
    pieces = program.stream_chat(QUESTION, 8, temperature=1.0, seed=3)
    assert "".join(piece.text or "" for piece in pieces) == expected.text
    assert len(program.chat(QUESTION).tokens) == 32 - len(ids)
    with pytest.raises(xl.RequestError, match="no aliens"):
        program.stream_chat([{"role": "alien", "content": ""}])
    with pytest.raises(xl.RequestError, match="positions"):
        program.chat([{"role": "user", "content": "def " * 40}])


def test_the_card_travels_with_a_graph(tiny: xl.Graph, tmp_path: Path) -> None:
    tiny.replace(card=CARD).save(tmp_path)
    assert xl.load_graph(tmp_path).card == CARD
    meta = tmp_path / "graph.json"
    meta.write_text(meta.read_text().replace('"chat_template": "', '"chat_template": 3, "x": "'))
    with pytest.raises(xl.GraphFileError, match=r"graph\.json: the model's card: expected an object of"):
        xl.load_graph(tmp_path)


def test_a_loaded_bundle_chats_without_flax(program: Program, bundle: Path) -> None:
    code = (
        "import sys; sys.modules['flax'] = None; sys.modules['xlathe.models'] = None; import xlathe as xl; "
        f"print(list(xl.load({str(bundle)!r}).chat({QUESTION!r}, 8).tokens))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (str(list(program.chat(QUESTION, 8).tokens)), 0), done.stderr


def chat(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", *map(str, words)])


def test_a_conversation(program: Program, bundle: Path, monkeypatch: Any, capsys: Any) -> None:
    """Expected: later answers see the turns before them."""
    turns: list[dict[str, str]] = [{"role": "system", "content": "be"}]
    expected = ""
    for question in ("hi", "me"):
        turns.append({"role": "user", "content": question})
        answer = program.chat(turns, 4, temperature=1.0, seed=5).text or ""
        turns.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    flags = ["--system=be", "--max_tokens=4", "--temperature=1", "--seed=5"]
    assert chat(monkeypatch, "hi\n\nme\n", bundle, *flags) == 0
    assert capsys.readouterr() == (expected, "")


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(bundle: Path, monkeypatch: Any, capsys: Any) -> None:
    seen = []

    def stream(self: Program, turns: Any, *_: Any, **__: Any) -> Iterator[Piece]:
        seen.append([dict(turn) for turn in turns])
        yield Piece(0, (1,), "part")
        raise KeyboardInterrupt

    def first(self: Program, turns: Any, **options: Any) -> Iterator[Piece]:
        return stream(self, turns)

    monkeypatch.setattr(Program, "stream_chat", first)
    assert chat(monkeypatch, "one\ntwo\n", bundle) == 0
    assert capsys.readouterr().out == "part\npart\n"
    assert [turn["content"] for turn in seen[1]] == ["one", "part", "two"]


def test_a_model_without_a_template_is_told_at_once(tiny_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(xlathe.program, "compile", None)  # nothing is compiled before
    assert chat(monkeypatch, "hi\n", tiny_folder) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("xlathe: error: this model has no chat template")
