"""`xlathe sweep`: one source made smaller in several ways, and what each costs in quality, size, time and memory."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xlathe.errors import OptionError, XlatheError
from xlathe.tools.command import Options, UsageError, Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.eval import define_protocol
from xlathe.tools.protocol import Protocol, beginning, cut, find_protocol
from xlathe.tools.source import DEMO, DEMO_LENGTH, define_calibration, open_graph, parse_passes, preset
from xlathe.tools.text import encode, find_calibration, held_out_windows, read_text

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from xlathe.graph import Graph
    from xlathe.tools.sweep_report import Report
    from xlathe.tools.sweep_rows import Job, Row

ROWS = "rows"
EVAL_TOKENS = 8192  # of the demo's held-out text
_PARTS = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^;])+')  # between semicolons that are in no string


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "pipelines",
        None,
        "what to compare, separated by ';', or a file with one a line: a config's name, passes, gguf:TYPE (with the "
        "calibration text's importance matrix gguf:TYPE,imatrix), each maybe after a name and ':'",
        flag_values=values,
    )
    flags.DEFINE_string("text", None, "file of the text that is predicted; the demo has its own", flag_values=values)
    define_calibration(values)
    define_protocol(values)


def run(options: Options, source: str, destination: str) -> None:
    if options["pipelines"] is None:
        raise UsageError("which pipelines? --pipelines='int8; int4'")
    ways = read_ways(options["pipelines"])
    rows = sweep(options, source, Path(destination), ways, make_console()).rows
    failed = [row for row in rows if row.figures is None]
    if failed:
        told = f"{failed[0].name}: {failed[0].error}"
        raise OptionError(f"{len(failed)} of {len(rows)} pipelines could not be measured; {told}")


def sweep(
    options: Options, source: str, folder: Path, ways: Mapping[str, str], console: "Console"
) -> "Report":
    """Measures every way, by name, and writes table.txt, sweep.json, page.html and plot.png; returns what they tell.

    A row that fails is told and does not keep others from being measured. Raises OptionError for a way that is none,
    before anything is measured.

    Rows that were measured before stand in the folder and are not measured again. options: `text`, `calibration`,
    `calibration_rows`, `protocol` and `context`.
    """
    from xlathe.tools.sweep_report import Report, write_report

    protocol, ways = find_protocol(options["protocol"]), {name: _read_way(name, way) for name, way in ways.items()}
    with bar(console, "load"):
        graph = open_graph(source, changing=True)
        windows = _windows(options, source, graph, protocol)
        calibration = find_calibration(options, source, graph)
    jobs = _jobs(source, folder, ways, windows, calibration, protocol)
    rows: list[Row] = []
    for name, job in jobs.items():
        with bar(console, f"{name} ({len(rows) + 1} of {len(jobs)})"):
            rows.append(_row(folder / ROWS, name, job))
        console.print(f"{name}: {rows[-1].error or 'measured'}", soft_wrap=True)
    report = Report(source, protocol.describe(windows.shape[1]), len(windows), tuple(rows))
    for line in write_report(report, folder):
        console.print(line, soft_wrap=True)
    return report


def read_ways(text: str) -> dict[str, str]:
    """Returns ways by their names; raises OptionError for two of one name."""
    path = Path(text)
    lines = read_text(path, "pipelines").splitlines() if path.is_file() else _PARTS.findall(text)
    found: dict[str, str] = {}
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        named = re.match(r"(?!gguf:)([^{}:,]+):(.*)", line, re.DOTALL)
        name, way = (named[1].strip(), named[2].strip()) if named else (line, line)
        if name in found:
            raise OptionError(f"--pipelines has two called {name!r}; a name and ':' before one tells them apart")
        found[name] = way
    if not found:
        raise OptionError("--pipelines names none")
    return found


def _windows(options: Options, source: str, graph: "Graph", protocol: Protocol) -> "np.ndarray":
    if options["text"] is None:
        if source != DEMO:
            raise UsageError("which text? --text=FILE")
        return _own_windows(DEMO_LENGTH if options["context"] is None else options["context"])
    tokens = encode(read_text(Path(options["text"]), "text"), graph.tokenizer, source, "evaluating a text")
    return cut(protocol, tokens, beginning(graph.tokenizer), graph.max_len, options["context"])


def _own_windows(context: int) -> "np.ndarray":
    """Returns the beginnings of the demo's held-out windows."""
    if not 2 <= context <= DEMO_LENGTH:
        raise OptionError(f"context={context}: expected 2 to {DEMO_LENGTH}, the longest text that the demo takes")
    return held_out_windows(EVAL_TOKENS)[:, :context]


def _jobs(
    source: str,
    folder: Path,
    ways: Mapping[str, str],
    windows: "np.ndarray",
    calibration: "Sequence[np.ndarray]",
    protocol: Protocol,
) -> "dict[str, Job]":
    """Returns a job for every way, after writing the tokens that all of them read."""
    import numpy as np

    from xlathe.tools.sweep_rows import Job

    (folder / ROWS).mkdir(parents=True, exist_ok=True)
    rows = np.concatenate(calibration) if len(calibration) else np.zeros((0, 1), np.int32)
    files = {"windows": windows, "calibration": rows}
    for name, tokens in files.items():
        np.save(folder / f"{name}.npy", tokens)
    paths = {name: str(folder / f"{name}.npy") for name in files}
    first = protocol.first(windows.shape[1])
    return {name: Job(source, way, **paths, first=first, clustered=protocol.clustered) for name, way in ways.items()}


def _row(folder: Path, name: str, job: "Job") -> "Row":
    """Returns the row that was measured before, if it was of the same things, else measures it."""
    from xlathe.tools.sweep_rows import Row, run_row

    path = folder / f"{_key(job)}.json"
    if path.exists():
        return dataclasses.replace(Row.of_json(json.loads(path.read_text(encoding="utf-8"))), name=name)
    row = run_row(name, job)
    if row.figures is not None:
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(row.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(whole, path)
    return row


def _read_way(name: str, way: str) -> str:
    """Returns the full text of passes, or of a config, whose name is one word and no pass; a GGUF type as it is."""
    from xlathe.models.formats.gguf.write import check_type
    from xlathe.passes import PASSES
    from xlathe.tools.sweep_rows import GGUF, IMATRIX

    try:
        if way.startswith(GGUF):
            check_type(way.removeprefix(GGUF).removesuffix(IMATRIX))
            return way
        return str(preset(way) if re.fullmatch(r"\w+", way) and way not in PASSES else parse_passes(way))
    except XlatheError as error:
        raise OptionError(f"--pipelines: {name}: {error}") from None


def _key(job: "Job") -> str:
    """Names what a row depends on: the source's files, the way, the tokens, and the version of this package."""
    from importlib.metadata import version

    told = [version("xlathe"), job.source, *_files(Path(job.source)), job.way, job.first, job.clustered]
    told += [hashlib.sha256(Path(each).read_bytes()).hexdigest() for each in (job.windows, job.calibration)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _files(source: Path) -> Iterator[tuple[str, int, int]]:
    for path in sorted([source] if source.is_file() else source.rglob("*")):
        if path.is_file():
            yield str(path), path.stat().st_size, path.stat().st_mtime_ns


VERB = Verb(
    "sweep", "measure several pipelines on one model: quality, size, time, memory", ("SOURCE", "OUT"), define, run
)
