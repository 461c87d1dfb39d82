"""`xlathe prune`: the plan first, then the smaller graph."""

import dataclasses
import re

import numpy as np
import pytest
from flax import nnx

import xlathe as xl
from tests.tools.conftest import TINY
from tests.tools.test_verbs import TOKENS, run
from xlathe.models import demo
from xlathe.models.llama import Llama
from xlathe.passes.prune import PrunePlan, prune
from xlathe.report import count_parameters
from xlathe.tools.distill import fused
from xlathe.tools.main import main


@pytest.fixture(scope="module")
def wide() -> xl.Graph:
    """Of several multiples of 32 features and neurons, which are what a plan keeps."""
    config = dataclasses.replace(TINY, width=96, layers=2, hidden=128)
    return xl.trace(Llama(config, rngs=nnx.Rngs(0)), max_len=32, tokenizer=demo.tokenizer())


@pytest.fixture(scope="module")
def wide_folder(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs") / "wide"
    wide.save(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def read_file(path):\n    return path.read_text()\n" * 16)
    return f"--calibration={path}"


def test_to_a_budget(wide, wide_folder, tmp_path, capsys, text):
    """Expected: within the budget, what the plan says, and the plan in a file."""
    out, file = tmp_path / "out", tmp_path / "plan.json"
    told = run(capsys, "prune", wide_folder, out, "--params=0.7", text, f"--plan={file}")
    plan, small = PrunePlan.load(file), xl.load_graph(out)
    assert told.splitlines()[: len(str(plan).splitlines())] == str(plan).splitlines()
    assert count_parameters(small) == plan.after.parameters <= 0.7 * count_parameters(wide)
    np.testing.assert_allclose(small(TOKENS), prune(fused(wide), plan)(TOKENS), rtol=1e-5, atol=1e-5)


def test_a_plan_alone_writes_nothing(wide_folder, tmp_path, capsys, text):
    told = run(capsys, "prune", wide_folder, tmp_path / "out", "--hidden=0.5", text, "--plan_only")
    assert "hidden" in told and "64 of 96" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ([], 2, "how small? --params=0.5"),
        (["--params=0.5", "--layers=1"], 1, "a budget finds the shape; leave out heads, neurons, "),
        (["--hidden=0.5", "--score=weight"], 1, "predicts nothing"),
        (["--params=0.5"], 1, "calibration"),
    ],
)
def test_refused(tiny_folder, tmp_path, capsys, words, code, reason):
    assert main(["prune", str(tiny_folder), str(tmp_path / "out"), *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("--params=0.001", "params=0.001 cannot be met: the smallest possible is"),
        ("--latency=60000", r"latency=60000.0: a token takes .* ms already"),
    ],
)
def test_a_budget_that_cannot_be_met(tiny_folder, tmp_path, capsys, text, budget, reason):
    assert main(["prune", str(tiny_folder), str(tmp_path / "out"), budget, text]) == 1
    assert re.search(reason, capsys.readouterr().err)
