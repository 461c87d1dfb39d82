"""What `xlathe demo` measures: quality on windows of tokens, and speed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from xlathe.program import Program, Stats
from xlathe.tools.bench_kernels import memory_read
from xlathe.tools.quality import Quality, summarize
from xlathe.tools.scores import Progress, compare
from xlathe.verify import Model


@dataclasses.dataclass(frozen=True)
class Speed:
    """Medians over rounds.

    prefill, decode: tokens a second; read_limit: bytes a second when as many bytes as the weights have are
    read and nothing else is done.
    """

    prefill: float
    decode: float
    read_limit: float


def qualities(
    reference: Model, models: Sequence[Model], windows: np.ndarray, progress: Progress
) -> list[Quality]:
    """Compares models with the one that they came from on windows int32 [n, length], n >= 2, by all their tokens."""
    compared = compare(reference, models, windows, first=0, progress=progress)
    return [summarize(each, clustered=True) for each in compared]


def speeds(
    programs: Sequence[tuple[Program, int]],
    prompt: Sequence[int],
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> list[Speed]:
    """Times programs, each with the bytes of its weights, on one row.

    All take turns, so that a disturbance of the machine meets them alike. The first round does not count.
    """
    reads = [memory_read(size) for _, size in programs]
    runs: list[list[Stats]] = [[] for _ in programs]
    for number in range(rounds + 1):
        progress("measure speed", number / (rounds + 1))
        for (program, _), stats, read in zip(programs, runs, reads, strict=True):
            stats.append(program.generate([prompt], max_tokens=new_tokens)[0].stats)
            read.measure()
    return [
        Speed(
            float(np.median([run.prompt_tokens / run.prefill_seconds for run in stats[1:]])),
            float(np.median([run.new_tokens / run.decode_seconds for run in stats[1:]])),
            size / float(np.median(read.seconds[1:])),
        )
        for (_, size), stats, read in zip(programs, runs, reads, strict=True)
    ]
