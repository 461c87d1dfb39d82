"""`xlathe sweep`: a row a way, of figures that are computed apart from it; what fails costs no other row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import xlathe as xl
from tests.models.formats.test_text_travels import spoken
from tests.tools.test_demo import Reader
from xlathe.errors import OptionError
from xlathe.models.formats.huggingface import write_huggingface
from xlathe.report import count_parameters
from xlathe.tools import sweep_rows
from xlathe.tools.main import main
from xlathe.tools.quality import Quality
from xlathe.tools.source import preset
from xlathe.tools.sweep import read_ways
from xlathe.tools.sweep_report import Report, as_text, front, page, points, sheet, write_png
from xlathe.tools.sweep_rows import Figures, Job, Row, measure, peak_memory, run_row
from xlathe.verify import Estimate

TEXT = "def read_file(path):\n    with open(path) as file:\n        return file.read()  # naïve\n" * 4
WAYS = (
    "int8; <b>huge</b>: canonicalize,quantize{scheme=int4,group=96}; "
    "wide: canonicalize,fuse_attention,quantize{scheme=int4,group=64}"
)


@pytest.fixture(scope="module")
def swept(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text").write_text(TEXT, encoding="utf-8")
    words = [str(tiny_folder), str(folder / "out"), f"--text={folder / 'text'}", "--context=16"]
    assert main(["sweep", *words, f"--pipelines={WAYS}"]) == 1  # some failed
    return folder


@pytest.fixture(scope="module")
def rows(swept: Path) -> dict[str, dict]:
    found = json.loads((swept / "out" / "sweep.json").read_text())
    return {row["name"]: row for row in found["rows"]}


def test_figures_are_those_of_the_graphs(rows, tiny):
    small = preset("int8")(tiny)
    ids = tiny.tokenizer.encode(TEXT).ids
    windows = np.asarray(ids[: len(ids) // 16 * 16], np.int32).reshape(-1, 16)
    before, after = (np.asarray(graph(windows), np.float64)[:, 8:-1] for graph in (tiny, small))
    before, after = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (before, after))
    kl = (np.exp(before) * (before - after)).sum(-1)
    found = rows["int8"]["figures"]
    assert found["quality"]["kl"]["mean"] == pytest.approx(kl.mean(), rel=0.01)
    assert found["quality"]["kl_tail"]["mean"] == pytest.approx(np.quantile(kl, 0.99), rel=0.01)
    size = sum(small.arrays[name].nbytes for name in small.names("weight"))
    assert found["bytes"] == size and found["bits_per_weight"] == 8 * size / count_parameters(tiny)
    assert found["seconds"] > 0 and found["peak"] > 50e6
    assert rows["int8"]["way"] == str(preset("int8")) and rows["int8"]["front"]


def test_what_fails_is_a_row_with_its_error(rows):
    assert "group=96 does not divide 32" in rows["<b>huge</b>"]["error"]
    assert "group=64 does not divide 32" in rows["wide"]["error"]
    assert not rows["wide"]["figures"] and not rows["wide"]["front"]


def test_rows_that_are_done_are_not_measured_again(swept, tiny_folder, monkeypatch, capsys):
    def never(name: str, job: Job) -> Row:
        assert name in ("wide", "<b>huge</b>"), "only what failed is tried again"
        return Row(name, job.way, error="failed again")

    monkeypatch.setattr(sweep_rows, "run_row", never)
    before = json.loads((swept / "out" / "sweep.json").read_text())["rows"][0]
    words = [str(tiny_folder), str(swept / "out"), f"--text={swept / 'text'}", "--context=16"]
    assert main(["sweep", *words, f"--pipelines={WAYS.replace('int8;', 'eight: int8;')}"]) == 1
    after = json.loads((swept / "out" / "sweep.json").read_text())["rows"]
    assert after[0] == {**before, "name": "eight"} and after[2]["error"] == "failed again"
    out, err = capsys.readouterr()
    assert "failed again" in out and "2 of 3 pipelines could not be measured; <b>huge</b>: failed again" in err
    # Expected: other windows are another measurement, which the process would have to make.
    with pytest.raises(AssertionError, match="only what failed"):
        main(["sweep", *words[:-1], "--context=12", "--pipelines=int8"])


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("a: canonicalize,quantize{scheme=int5}", "--pipelines: a: 'int5': 'int5' is not known; did you mean 'int8'?"),
        ("int9", "--pipelines: int9: no config 'int9'; did you mean"),
        ("gguf:Q4_KM", "--pipelines: gguf:Q4_KM: type: no type 'Q4_KM' to write; did you mean 'Q4_K_M'?"),
    ],
)
def test_a_way_that_is_none_is_told_before_anything_is_measured(way, message, tiny_folder, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    words = ["sweep", str(tiny_folder), str(tmp_path / "out"), f"--text={tmp_path / 'text'}"]
    assert main([*words, f"--pipelines=int8; {way}"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sweep_that_is_terminated_leaves_no_process(tiny_folder, tmp_path):
    """A row that hangs: its windows are a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "windows")
    job = json.dumps(["demo", "float32", str(tmp_path / "windows"), "", 0, False])
    code = (
        "import json, sys, xlathe.tools.main as m, xlathe.tools.sweep as s; from xlathe.tools import sweep_rows as r\n"
        f"s.sweep = lambda *_: r.run_row('hangs', r.Job(*json.loads({job!r})))\n"
        "sys.exit(m.main(['sweep', 'demo', 'out', '--pipelines=int8']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not Path(f"/proc/{found[0]}").exists()


def test_a_process_that_ends_is_an_error(monkeypatch):
    job = Job("demo", "", "", "", 0, clustered=False)
    assert run_row("lost", job).error.startswith("FileNotFoundError: ")
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    original = sweep_rows.subprocess.run
    monkeypatch.setattr(
        sweep_rows.subprocess, "run", lambda words, **options: original([sys.executable, "-c", killed], **options)
    )
    assert run_row("killed", job).error == "ended by signal 9, maybe for want of memory"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells a process's own peak")
def test_the_peak_is_of_the_process_alone():
    """This process holds 300 MB more than the one that it starts."""
    held = np.ones(300_000_000, np.uint8)
    code = "import sys; from xlathe.tools.sweep_rows import peak_memory; print(peak_memory())"
    found = int(sweep_rows.subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert peak_memory() > 300e6 and held[-1] == 1
    assert found < peak_memory() - 200e6


def test_a_way_may_be_a_type_of_gguf_files(tmp_path):
    """Expected: F16 loses rounding alone, and its bytes are those of the file's tensors; norms stay float32."""
    write_huggingface(spoken("llama"), tmp_path / "hf")
    graph = xl.from_pretrained(tmp_path / "hf")
    np.save(tmp_path / "windows.npy", np.random.default_rng(0).integers(0, graph.vocab, (3, 24), dtype=np.int32))
    np.save(tmp_path / "none.npy", np.zeros((0, 1), np.int32))
    job = Job(str(tmp_path / "hf"), "gguf:F16", str(tmp_path / "windows.npy"), str(tmp_path / "none.npy"), 12, False)
    found = measure(job)
    shapes = [graph.aval(name).shape for name in graph.names("weight")]
    assert found.bytes == sum(np.prod(shape) * (2 if len(shape) > 1 else 4) for shape in shapes)
    assert 0 < found.quality.kl.mean < 1e-5


def row(name: str, size: int, kl: float) -> Row:
    one = Estimate(1.0, 0.1)
    quality = Quality(one, one, one, one, Estimate(kl, kl / 10), one, one, one, one, one)
    return Row(name, name, Figures(quality, size, 4.0, 1.0, 10**9))


ROWS = (
    *(row("best", 10, 0.5), row("close", 20, 0.1), row("worse", 20, 0.6), row("larger", 30, 0.1), row("same", 40, 0.0)),
    Row("<i>none</i>", "nothing{}", error="no <b>luck</b>"),
)


def test_the_pareto_front():
    assert front(ROWS) == {"best", "close", "same"}
    assert front([row("a", 1, 0.1), row("b", 1, 0.1)]) == {"a", "b"}


def test_the_page_holds_every_cell_and_escapes_what_others_wrote():
    report = Report("demo", "protocol windows", 3, ROWS)
    read = Reader(page(report))
    told = sheet(report)
    assert {told.caption, *told.headings, *(cell for cells in told.rows for cell in cells if cell)} <= set(read.cells)
    assert "no <b>luck</b>" in read.text and not {"b", "i"} & set(read.seen)
    assert page(report).count('class="point marked"') == 2 and read.seen.count("polyline") == 1
    assert [point.name for point in points(ROWS)] == ["best", "close", "worse", "larger"]  # `same` is not apart
    assert "<i>none</i>: no <b>luck</b>\n" in as_text(report)


@pytest.mark.parametrize("rows", [ROWS[4:], (row("collapsed", 10, np.inf),), ROWS[5:]], ids=["same", "inf", "failed"])
def test_a_page_with_nothing_to_plot(rows):
    report = Report("demo", "protocol windows", 3, rows)
    assert "<svg" not in page(report) and rows[0].name in as_text(report)


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install xlathe[plots]")
    write_png(points(ROWS), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_ways_are_read_from_text_and_from_files(tmp_path):
    expected = {"int8": "int8", "a b": "quantize{scheme=int4,group=32}", "gguf:Q8_0": "gguf:Q8_0", "q": "gguf:Q8_0"}
    text = "int8; a b: quantize{scheme=int4,group=32} ;;gguf:Q8_0; q: gguf:Q8_0"
    assert read_ways(text) == expected
    (tmp_path / "ways").write_text("# ways\n" + text.replace(";", "\n"))
    assert read_ways(str(tmp_path / "ways")) == expected
    regex = r'canonicalize,quantize{weights=".*:x;y\";z"}'
    assert read_ways(f"{regex};int8") == {regex: regex, "int8": "int8"}
    with pytest.raises(OptionError, match="two called 'int8'"):
        read_ways("int8; int8")
    with pytest.raises(OptionError, match="names none"):
        read_ways(" ; ")
