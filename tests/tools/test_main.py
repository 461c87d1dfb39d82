"""Words in, text and an exit code out."""

import subprocess
import sys

import pytest

from xlathe.tools.main import VERBS, main


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Runs words that are wrong; returns the one line that says so."""
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xlathe: error: ") and err.endswith("\n")
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_without_a_verb_all_verbs_are_listed(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(VERBS)


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("words", [["help", "{}"], ["{}", "--help"]])
def test_every_verb_explains_itself(name, words, capsys):
    assert main([word.format(name) for word in words]) == 0
    assert capsys.readouterr().out.startswith(f"usage: xlathe {name} ")


def test_help_tells_flags_with_their_defaults(capsys):
    main(["generate", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "  --max_tokens=INT           the most tokens to generate (default 64)" in lines


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compil", "a", "b"], "no verb 'compil'; did you mean 'compile'?"),
        (["help", "generat"], "no verb 'generat'; did you mean 'generate'?"),
        (["compile", "a"], "expected xlathe compile SOURCE OUT [--flags], found the words 'a'"),
        (["passes", "a"], "expected xlathe passes [--flags], found the words 'a'"),
        (["compile", "a", "b", "--max_bach=3"], "Did you mean: max_batch"),
        (["compile", "a", "b", "--max_batch=many"], "--max_batch=many"),
        (["opt", "a", "b"], "which passes?"),
        (["eval", "a"], "which text? --text=FILE"),
        (["eval", "a", "--text=b", "--json=none/such.json"], "--json=none/such.json: expected a file in a folder that"),
        (["opt", "a", "b", "--passes=canonicalize", "--config=int8"], "--passes and --config both name"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(words, expected, capsys):
    assert expected in fails(capsys, 2, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["opt", "a", "b", "--passes=fuse_atention"], "did you mean 'fuse_attention'?"),
        (["opt", "a", "b", "--passes=quantize{scheem=int8}"], "did you mean 'scheme'?"),
        (["opt", "a", "b", "--config=int"], "no config 'int'; did you mean 'int8'?"),
        (["demo", "--eval_tokens=511"], "--eval_tokens=511: expected at least 1024"),
    ],
)
def test_bad_input_is_told_in_one_line(words, expected, capsys):
    assert expected in fails(capsys, 1, *words)


@pytest.mark.parametrize("words", [["help"], ["compile", "--help"], ["generate", "a"]])
def test_help_and_usage_do_not_wait_for_jax(words):
    code = f"import sys, xlathe.tools.main as m; m.main({words}); print('jax' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False False\n")
