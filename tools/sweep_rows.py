"""One row of a sweep: a source made smaller in one way, in a process of its own, and what came out.

`python -m xlathe.tools.sweep_rows JOB.json ROW.json` is that process: its peak of memory is of this row alone, and what
ends it ends nothing else.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xlathe.errors import XlatheError
from xlathe.tools.process_memory import memory_of
from xlathe.verify import Estimate

if TYPE_CHECKING:
    import numpy as np

    from xlathe.graph import Graph
    from xlathe.tools.quality import Quality

GGUF: Final = "gguf:"  # before the type of a GGUF file, where a row is no pipeline
IMATRIX: Final = ",imatrix"  # after the type, where errors are weighed by what calibration saw


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process does.

    way: a pipeline as text, or `gguf:` and a file type, maybe with `,imatrix`; windows, calibration: files of int32
    [n, length], the latter with n = 0 where there is none; first, clustered: of the protocol.
    """

    source: str
    way: str
    windows: str
    calibration: str
    first: int
    clustered: bool


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured: bytes of the weights, seconds of making and writing them, and the most memory meanwhile."""

    quality: "Quality"
    bytes: int
    bits_per_weight: float
    seconds: float
    peak: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make the source smaller: its figures, or why there are none."""

    name: str
    way: str
    figures: Figures | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def of_json(value: dict[str, Any]) -> "Row":
        return Row(**{**value, "figures": _figures(value["figures"]) if value["figures"] else None})


def _figures(value: dict[str, Any]) -> Figures:
    from xlathe.tools.quality import Quality

    quality = Quality(**{name: Estimate(**estimate) for name, estimate in value["quality"].items()})
    return Figures(**{**value, "quality": quality})


def run_row(name: str, job: Job) -> Row:
    """Runs a job in a process of its own; whatever goes wrong there is the row's error."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "job.json", Path(folder) / "row.json"
        given.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "xlathe.tools.sweep_rows", str(given), str(made)]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if ended.returncode == 0:
            return Row(name, job.way, _figures(json.loads(made.read_text(encoding="utf-8"))))
    return Row(name, job.way, error=_reason(ended.returncode, ended.stderr.decode(errors="replace")))


def _reason(code: int, told: str) -> str:
    if code < 0:
        return f"ended by signal {-code}" + (", maybe for want of memory" if code == -9 else "")
    lines = told.strip().splitlines()
    return lines[-1] if lines else f"ended with code {code}"


def measure(job: Job) -> Figures:
    """Makes the source smaller as a row says, writes it, and compares what is read back with the source."""
    import numpy as np

    from xlathe.report import count_parameters
    from xlathe.tools.quality import summarize
    from xlathe.tools.scores import compare
    from xlathe.tools.source import open_graph

    graph, windows = open_graph(job.source, changing=True), np.load(job.windows)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        small, size = _make(graph, job, Path(folder))
        seconds, peak = time.perf_counter() - start, peak_memory()
        scores = compare(graph, [small], windows, job.first, lambda text, fraction: None)[0]
    return Figures(summarize(scores, job.clustered), size, 8 * size / count_parameters(graph), seconds, peak)


def _make(graph: "Graph", job: Job, folder: Path) -> "tuple[Graph, int]":
    """Returns what was written, and the bytes of its weights from their shapes alone."""
    import numpy as np

    from xlathe.graph_file import load_graph
    from xlathe.report import weight_bytes
    from xlathe.tools.source import parse_passes

    calibration = list(np.load(job.calibration)[:, None])
    if job.way.startswith(GGUF):
        type = job.way.removeprefix(GGUF)
        seen = calibration if type.endswith(IMATRIX) else []
        return _make_gguf(graph, type.removesuffix(IMATRIX), seen, folder / "model.gguf")
    parse_passes(job.way)(graph, calibration=calibration).save(folder)
    small = load_graph(folder)
    return small, weight_bytes(small)


def _make_gguf(graph: "Graph", type: str, seen: "list[np.ndarray]", path: Path) -> "tuple[Graph, int]":
    """seen: the text of the importance matrix; without any, there is none."""
    from xlathe.models.export import to_checkpoint
    from xlathe.models.formats.gguf import plan_gguf, write_plan
    from xlathe.models.pretrained import from_pretrained
    from xlathe.tools.imatrix import importance_of

    checkpoint = to_checkpoint(graph)
    plan = plan_gguf(checkpoint, type)
    if seen:
        plan = plan_gguf(checkpoint, type, importance=importance_of(graph, plan, seen))
    write_plan(plan, path)
    return from_pretrained(path, max_len=graph.max_len, packed=False), plan.size


def peak_memory() -> int:
    """Returns the most bytes that this process has held, mapped files included.

    On Linux of its own memory map: `getrusage` tells that of the process that started it, where that was larger.
    """
    found = memory_of("VmHWM")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(given: str, made: str) -> None:
    job = Job(**json.loads(Path(given).read_text(encoding="utf-8")))
    try:
        figures = measure(job)
    except XlatheError as error:
        sys.exit(" ".join(str(error).split()))
    Path(made).write_text(json.dumps(dataclasses.asdict(figures)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
