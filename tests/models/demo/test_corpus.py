"""The split of the corpus and the tokenizer."""

import hashlib
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from xlathe.models import demo
from xlathe.models.demo import corpus


def name_of_side(test: bool) -> str:
    """A file name of the wanted side, found by the rule as the README states it."""
    names = (f"module{i}.py" for i in range(1000))
    return next(n for n in names if (int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) % 20 == 0) == test)


def write(library: Path, path: str, text: str) -> None:
    (library / path).parent.mkdir(parents=True, exist_ok=True)
    (library / path).write_text(text)


def distinct_text(word: str) -> str:
    return "".join(f"{word}_{i} = some_long_function_name({i})\n" for i in range(5))


@pytest.mark.parametrize("folder", ["", "email/", "a/b/"])
def test_the_side_depends_on_the_name_alone(folder: str) -> None:
    assert corpus.held_out(PurePosixPath(folder + name_of_side(test=True)))
    assert not corpus.held_out(PurePosixPath(folder + name_of_side(test=False)))


def test_held_out_text_is_not_trained_on_even_under_another_name(tmp_path: Path) -> None:
    test, train = name_of_side(test=True), name_of_side(test=False)
    write(tmp_path / "old", test, distinct_text("held_out"))
    write(tmp_path / "new", train, distinct_text("held_out"))
    write(tmp_path / "new", "pkg/" + train, distinct_text("seen"))
    assert corpus.training_files([tmp_path / "old", tmp_path / "new"]) == [distinct_text("seen")]


def test_the_newest_version_of_a_path_is_kept_and_copies_are_dropped(tmp_path: Path) -> None:
    name = name_of_side(test=False)
    write(tmp_path / "old", name, distinct_text("old"))
    write(tmp_path / "new", name, distinct_text("new"))
    write(tmp_path / "new", "copy/" + name, distinct_text("new"))
    assert corpus.training_files([tmp_path / "old", tmp_path / "new"]) == [distinct_text("new")]


def test_badly_encoded_files_tables_and_test_suites_are_skipped(tmp_path: Path) -> None:
    for path in ("encodings/a.py", "test/b.py", "site-packages/c.py", "d.txt"):
        write(tmp_path, path, "x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# \xff\n")
    write(tmp_path, "good.py", "x = 1\n")
    assert list(corpus.source_files(tmp_path)) == [(PurePosixPath("good.py"), "x = 1\n")]


def test_held_out_tokens_are_the_running_interpreter_s_and_repeatable() -> None:
    first = corpus.held_out_tokens(5000)
    assert first.dtype == np.int32 and first.shape == (5000,) and first[0] == corpus.END_OF_TEXT
    np.testing.assert_array_equal(first[:1000], corpus.held_out_tokens(1000))
    assert demo.tokenizer().decode(first[1:50].tolist()) in "".join(corpus.held_out_files())


TEXTS = [
    "def f(x):\n    if x:\n        return 1\n\n\n    raise  ValueError\n",
    "\ttabs\t\t and trailing   \n \r\n windows\r\nlines\r",
    "caf\u00e9 \u4e2d\u6587 \U0001f642 \u200b \x00\x7f",
    "   leading, and an end of text <|endoftext|> in the middle",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = demo.tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_indentation_is_one_token() -> None:
    assert len(demo.tokenizer().encode("\n        ").ids) == 1


def test_vocabulary() -> None:
    assert demo.tokenizer().get_vocab_size() == 4096
    assert demo.tokenizer().token_to_id("<|endoftext|>") == corpus.END_OF_TEXT == 0
