"""The table in the documentation has the rows and columns that the command would write."""

from pathlib import Path

import pytest

from tests.tools.test_sweep import row
from xlathe.errors import XlatheError
from xlathe.passes import PASSES
from xlathe.pipeline import Pipeline
from xlathe.tools import scoreboard
from xlathe.tools.scoreboard import CAPTION, ENTRIES, Entry, in_readme, markdown
from xlathe.tools.sweep_report import HEADINGS, Report
from xlathe.tools.sweep_rows import GGUF, Row

README = Path(__file__).parents[2] / scoreboard.README


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_documentation_is_in_step():
    """`python -m xlathe.tools.scoreboard --update` writes it."""
    block = in_readme(README.read_text(encoding="utf-8"))
    head, rule, *rows = table(block)
    assert head == ["method", "scheme", *(heading.replace("\n", " ") for heading in HEADINGS)]
    assert len(rule) == len(head)
    assert [cells[:2] for cells in rows] == [[f"`{entry.method}`", f"`{entry.scheme}`"] for entry in ENTRIES]
    assert "\n" + CAPTION in block
    for cells in rows:
        assert len(cells) == len(head) and (cells[2] == "failed" or all(cells[2:-1])), cells


def kl(*name: str) -> tuple[float, float]:
    """Returns a row's divergence and its standard error."""
    _, _, *rows = table(in_readme(README.read_text(encoding="utf-8")))
    (found,) = (cells[2] for cells in rows if tuple(cell.strip("`") for cell in cells[:2]) == name)
    mean, error = found.split(" ±")
    return float(mean), float(error)


def test_the_bars_of_quality_hold_in_it():
    """GPTQ removes a third of rounding's divergence, AWQ a fifth; two bits keep most of it by calibrated methods."""
    nearest = kl("rtn", "int4:g128")[0]
    assert kl("gptq", "int4:g128")[0] < nearest * 2 / 3 and kl("awq_scales, clip", "int4:g128")[0] < nearest * 4 / 5
    two = "int2:g64,asym"
    assert kl("auto_round{steps=50}", two)[0] < kl("gptq", two)[0] < kl("rtn", two)[0] * 0.6
    plain = "int8:channel,a=int8_token"
    assert kl("rotate, rtn", plain)[0] < kl("smooth_quant, rtn", plain)[0] < kl("rtn", plain)[0]
    assert kl("budget, search", "4.94 bits of q2_k to q8_0")[0] < kl("gguf", "Q4_K_M")[0] / 4


def test_file_types_come_in_their_order():
    """But for Q4_K_M, which the documentation explains. An importance matrix is never worse by more than an error."""
    types = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K")
    found = [kl("gguf", type)[0] for type in types]
    assert found == sorted(found)
    for type in types[1:]:
        assert kl("gguf, imatrix", type)[0] <= kl("gguf", type)[0] + kl("gguf", type)[1]


def test_every_row_is_a_way_and_named_once():
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        if not entry.way.startswith(GGUF):
            assert Pipeline.parse(entry.way, PASSES).passes


def test_rows_are_found_by_name_and_errors_are_told(monkeypatch):
    monkeypatch.setattr(scoreboard, "ENTRIES", tuple(Entry("m", s, "canonicalize") for s in ("a", "b", "c")))
    failed = Row("m b", "canonicalize", error=str(XlatheError("no luck")))
    text = markdown(Report("demo", "protocol windows", 2, (failed, row("m a", 8_000_000, 0.25))))
    head, _, first, second, third = table(text)
    assert first[:3] == ["`m`", "`a`", "250 ±25"]
    assert [cells[head.index(name)] for cells in (first,) for name in ("MB", "s", "peak MB", "front")] == [
        *("8.00", "1.0", "1,000", "*")
    ]
    assert second[2] == third[2] == "failed"
    assert "* `m b`: no luck\n" in text


@pytest.mark.parametrize("words", [[], ["--updat"], ["--update", "a", "b"]])
def test_a_wrong_command_line_changes_nothing(words):
    with pytest.raises(SystemExit, match="usage, in a checkout"):
        scoreboard.main(words)
