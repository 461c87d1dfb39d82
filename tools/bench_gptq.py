"""Measures GPTQ in 4 bits of a 1B Llama on 16 x 512 tokens: seconds by phase, and memory predicted and measured.

`python -m xlathe.tools.bench_gptq ['{"num_hidden_layers": 2}' [ROWS [LENGTH]]]`: random weights in bfloat16, as in
`bench_quantize` (5 GB of a temporary directory). Phases are told by looking every few milliseconds at what runs; memory
is what is no mapped file, so only Linux tells it.
"""

import collections
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Final

import numpy as np
from rich.table import Table

from xlathe.models.formats.huggingface import write_huggingface
from xlathe.models.pretrained import from_pretrained
from xlathe.passes import Canonicalize, FuseAttention, Quantize
from xlathe.passes.quantize.calibrate import IN_ORDER
from xlathe.passes.quantize.footprint import Footprint, footprint
from xlathe.pipeline import Pipeline
from xlathe.tools.bench_convert import random_llama
from xlathe.tools.bench_quantize import SHAPE
from xlathe.tools.console import make_console
from xlathe.tools.process_memory import memory_of
from xlathe.tools.stages import machine

EVERY: Final = 0.005  # seconds between looks
PHASES: Final = {  # by the innermost function of these that runs
    "_between": "forward",
    "_sums": "x^T x",
    "add_found": "x^T x",
    "inverse_factor": "Cholesky",
    "gptq": "columns",
    "_searched": "scales",
    "pack": "packing",
    "lower": "compiling",
    "compile": "compiling",
    "_follow": "digests",
    "save": "writing",
    "prepare": "reading",
}


class Watch(threading.Thread):
    """Looks at the main thread. seconds: by phase; peak: of anonymous memory, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: collections.Counter[str] = collections.Counter()
        self.start_bytes = memory_of("RssAnon") or 0
        self.peak, self.done = self.start_bytes, threading.Event()

    def run(self) -> None:
        main, before = threading.main_thread().ident, time.perf_counter()
        while not self.done.wait(EVERY):
            now = time.perf_counter()
            self.seconds[_phase(sys._current_frames()[main or 0])] += now - before  # type: ignore[assignment]
            self.peak, before = max(self.peak, memory_of("RssAnon") or 0), now


def _phase(frame: FrameType | None) -> str:
    while frame is not None:
        if found := PHASES.get(frame.f_code.co_name):
            return found
        frame = frame.f_back
    return "other"


def measure(config: dict[str, object], rows: int, length: int, folder: Path) -> tuple[Watch, Footprint]:
    """Quantizes a random checkpoint in this process and writes it."""
    write_huggingface(random_llama(config), folder / "source")
    tokens = np.random.default_rng(0).integers(0, int(str(config["vocab_size"])), (rows, 1, length), dtype=np.int32)
    graph = Pipeline([Canonicalize(), FuseAttention()])(from_pretrained(folder / "source", max_len=length))
    quantize = Quantize("int4:g128", method="gptq")
    plan = quantize.plan(graph)
    assert plan.method.statistics in IN_ORDER
    predicted = footprint(graph, plan, list(tokens), on_disk=True)
    assert predicted is not None
    watch = Watch()
    watch.start()
    Pipeline([quantize])(graph, calibration=list(tokens), work=folder / "work").save(folder / "made")
    watch.done.set()
    watch.join()
    return watch, predicted


def main(config: dict[str, object], rows: int, length: int) -> None:
    console = make_console()
    with tempfile.TemporaryDirectory() as name:
        watch, predicted = measure(config, rows, length, Path(name))
    total = watch.seconds.total()
    table = Table("phase", "seconds", "share", title=f"int4:g128 by gptq, {rows} x {length} tokens, {machine()}")
    for phase, seconds in watch.seconds.most_common():
        table.add_row(phase, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %")
    table.add_row("all", f"{total:.1f}", "")
    console.print(table)
    above, start = (watch.peak - watch.start_bytes) / 1e6, watch.start_bytes / 1e6
    console.print(f"measured {above:,.0f} MB above the {start:,.0f} MB at the start; predicted: {predicted}")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[2:]]
    sizes = {**SHAPE, "tie_word_embeddings": True, **json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")}
    main(sizes, *(given + [16, 512][len(given) :]))
