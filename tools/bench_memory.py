"""Measures the memory that a checkpoint takes while it is loaded and while it is quantized, tensor by tensor.

`python -m xlathe.tools.bench_memory` takes the sizes of Llama 3.2 1B, in bfloat16 (4 GB of a temporary directory). Only
Linux tells memory of a process apart from files that it maps.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xlathe.models.formats.huggingface import write_huggingface
from xlathe.tools.bench_convert import ONE_B, random_llama
from xlathe.tools.process_memory import memory_of

EVERY: Final = 0.01  # seconds between looks
COPIES, BESIDE = 4, 500_000_000  # of the largest tensor, as float32 and on its way; of code and what JAX compiles
LOAD: Final = """
import sys, xlathe
graph = xlathe.from_pretrained(sys.argv[1])
print(sum(graph.weights[name].nbytes for name in graph.names("weight")))
"""
OPT: Final = "import sys; from xlathe.tools.main import main; sys.exit(main(sys.argv[1:]))"


@dataclasses.dataclass(frozen=True)
class Measured:
    """peak: the most anonymous memory, in bytes; seconds: from start to end; allowed: the peak that may be."""

    name: str
    peak: int
    seconds: float
    allowed: int


def measure(config: dict[str, object], folder: Path) -> list[Measured]:
    """Writes a random checkpoint, loads it, and quantizes it to 4 bits."""
    checkpoint = random_llama(config)
    write_huggingface(checkpoint, folder / "source")
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    commands = {
        "load": ["-c", LOAD, str(folder / "source")],
        "opt int4": ["-c", OPT, "opt", str(folder / "source"), str(folder / "int4"), "--config=int4"],
    }
    allowed = COPIES * largest + BESIDE
    return [Measured(name, *run(words), allowed) for name, words in commands.items()]


def run(words: Sequence[str]) -> tuple[int, float]:
    """Runs Python with these words; returns the peak of its anonymous memory, and seconds."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, memory_of("RssAnon", process.pid) or 0)
            time.sleep(EVERY)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(words))
    return peak, time.perf_counter() - start


def main(config: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for each in measure(config, Path(folder)):
            print(json.dumps(dataclasses.asdict(each)))


if __name__ == "__main__":
    main({**ONE_B, **json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")})
