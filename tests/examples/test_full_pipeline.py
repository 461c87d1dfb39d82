"""The example that runs every stage works as it is."""

import runpy
from pathlib import Path

import pytest

import xlathe as xl

EXAMPLE = Path(__file__).parents[2] / "examples" / "full_pipeline.py"


def test_full_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](str(tmp_path))
    printed = capsys.readouterr().out
    for line in ("6 attention", "6 heads, 576 neurons", "43 weight", "12 paged", "tokens_per_step="):
        assert line in printed
    (completion,) = xl.load(tmp_path, verify="all").generate("def", max_tokens=4)
    assert len(completion.tokens) == 4
