"""`xlathe shrink`: rounds of pruning and healing, what is not done twice, and recipes that are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import xlathe as xl
from xlathe.errors import OptionError
from xlathe.models import demo
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes.distill.rows import Rows
from xlathe.report import count_parameters
from xlathe.tools.main import main
from xlathe.tools.shrink import Shrinking
from xlathe.tools.shrink_recipe import find_recipe, read_recipe

SIZES = LlamaConfig(vocab=4096, width=16, layers=2, query_heads=4, key_value_heads=4, head_dim=16, hidden=512)
TEXT = "def read_file(path):\n    with open(path) as file:\n        return file.read()\n" * 8
RECIPE = {
    "rounds": ["prune_structured{heads=0.25,neurons=0.25}", "prune_structured{heads=0.34}"],
    "tokens": 64,
    "loss": "forward_kl",
    "rows": 2,
    "context": 16,
    "quantize": "quantize{scheme=int8}",
}


def words(folder: Path, **changes: object) -> list[str]:
    """Writes the recipe and the texts; returns the command line."""
    (folder / "recipe.json").write_text(json.dumps(RECIPE | changes))
    (folder / "text").write_text(TEXT)
    texts = [f"--{flag}={folder / 'text'}" for flag in ("text", "eval_text")]
    return ["shrink", str(folder / "model"), str(folder / "out"), f"--config={folder / 'recipe.json'}", *texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    graph = xl.trace(Llama(SIZES, rngs=nnx.Rngs(0)), max_len=32, tokenizer=demo.tokenizer())
    graph.save(tmp_path / "model")
    return tmp_path


def test_rounds_end_in_a_bundle_and_are_not_done_twice(folder, capsys):
    assert main(words(folder)) == 0
    out = capsys.readouterr().out
    judged = [line.partition(" ")[2].split()[0] for line in out.splitlines() if "parameters" in line and "KL" in line]
    assert len(judged) == 5
    stages = folder / "out.stages"
    (first,), (second,) = (list(stages.glob(f"{number}-healed-*/")) for number in (1, 2))
    sizes = [count_parameters(xl.load_graph(each)) for each in (folder / "model", first, second)]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[1] >= sizes[0] * 2 / 3 and sizes[2] >= sizes[1] * 2 / 3
    assert len(xl.load(folder / "out").generate("def", max_tokens=2)[0].tokens) <= 2
    made = {path: path.stat().st_mtime_ns for path in folder.glob("out*/**/*") if path.is_file()}
    assert main(words(folder)) == 0
    again = capsys.readouterr().out
    assert [line for line in out.splitlines() if line[:2] in ("1:", "2:")] == [
        line for line in again.splitlines() if line[:2] in ("1:", "2:")
    ]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("out*/**/*") if path.is_file()} == made
    (folder / "other").write_text("import os\n" * 40)
    shutil.copytree(folder / "out", folder / "elsewhere")
    manifest = folder / "elsewhere" / "manifest.json"
    manifest.write_text(text := manifest.read_text() + "\n")  # any other bundle
    line = words(folder)
    line[2] = str(folder / "elsewhere")
    assert main([*line, f"--eval_text={folder / 'other'}", f"--workdir={stages}"]) == 0
    others = [line for line in capsys.readouterr().out.splitlines() if "parameters" in line and "KL" in line]
    before = [line for line in again.splitlines() if "parameters" in line and "KL" in line]
    assert [line.partition("MB")[0] for line in others] == [line.partition("MB")[0] for line in before]
    assert not set(others) & set(before)  # judged by another text
    assert {path for path in made if path.stat().st_mtime_ns != made[path]} <= set(stages.glob("*.written"))
    assert manifest.read_text() != text and xl.load(folder / "elsewhere")


def test_a_round_removes_at_most_a_third(folder, capsys):
    rounds = ["prune_structured{heads=0.75,neurons=0.9}"]
    assert main(words(folder, rounds=rounds)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "round 1 removes" in line and "at most a third" in line
    assert not (folder / "out").exists()


def test_padding_is_no_calibration():
    rows = Rows.cut(np.arange(1, 4 * 8 + 4), 8)
    shrinking = Shrinking(find_recipe("half"), None, rows, None, None, None, Path(), None)
    assert not rows.mask[-1].all() and [batch.tolist() for batch in shrinking._calibration] == [
        [row.tolist()] for row in rows.tokens[:-1, :-1]
    ]


def test_presets_are_recipes():
    recipe = find_recipe("half")
    assert len(recipe.rounds) == 2 and recipe.prune(0).params == 0.71


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": []}, "no key 'round'; did you mean 'rounds'"),
        ({"rounds": []}, "rounds is empty"),
        ({"rounds": ["quantize{scheme=int8}"]}, r"round 1: expected prune_structured\{...\}"),
        ({"tokens": "many"}, "tokens is not int: 'many'"),
        ({"quantize": "quantise"}, "did you mean 'quantize'"),
    ],
)
def test_recipes_that_are_none(changes, message):
    with pytest.raises(OptionError, match=message):
        read_recipe(RECIPE | changes, "here")


def test_names_that_are_none(tmp_path, capsys):
    with pytest.raises(OptionError, match="no recipe 'hlaf'; did you mean 'half'"):
        find_recipe("hlaf")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(OptionError, match="expected an object, got list"):
        find_recipe(str(tmp_path / "a.json"))
    with pytest.raises(OptionError, match="no tokens"):
        read_recipe({"rounds": RECIPE["rounds"]}, "here")
    assert main(["shrink", "demo", str(tmp_path / "out")]) == 2
    assert "which recipe? --config=half" in capsys.readouterr().err
