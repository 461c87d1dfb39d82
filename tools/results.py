"""What the demo measured, as tables and as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from xlathe.tools.measure import Quality, Speed
from xlathe.verify import Estimate


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one pipeline.

    disk_bytes: of the bundle's weight file; read_bytes: weights that decoding one token reads;
    compile_seconds: for all programs of the bundle.
    """

    name: str
    passes: str
    disk_bytes: int
    read_bytes: int
    bits_per_weight: float
    quality: Quality
    speed: Speed
    compile_seconds: float

    @property
    def read_rate(self) -> float:
        """Bytes of weights a second while decoding."""
        return self.read_bytes * self.speed.decode


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What was measured: quality on windows x length tokens, speed on one row in so many rounds."""

    machine: str
    windows: int
    length: int
    rounds: int
    prompt_tokens: int
    new_tokens: int


def quality_table(results: Sequence[Result], conditions: Conditions) -> Table:
    """Size and quality; the first result is the one that others are compared with."""
    tokens = conditions.windows * conditions.length
    table = _table(
        "Size and quality",
        f"{tokens:,} held-out tokens in {conditions.windows} windows; ± standard error over windows; "
        f"KL divergence in 10⁻³ nats a token",
        ("MB\non disk", "bits\na weight", "perplexity", f"KL from\n{results[0].name}", "same\ntop-1 %"),
    )
    for result in results:
        quality = result.quality
        table.add_row(
            result.name,
            f"{result.disk_bytes / 1e6:.2f}",
            f"{result.bits_per_weight:.2f}",
            _estimate(quality.perplexity),
            _estimate(quality.kl, 1e3),
            _estimate(quality.same_top1, 100),
        )
    return table


def speed_table(results: Sequence[Result], conditions: Conditions) -> Table:
    """Speed of one row; the first result is the one that others are compared with."""
    table = _table(
        "Speed",
        f"one row, prompt of {conditions.prompt_tokens} tokens, {conditions.new_tokens} new ones, median of "
        f"{conditions.rounds} rounds; the limit is plain reading of as many bytes; {conditions.machine}",
        (
            "prefill\ntokens/s",
            "decode\ntokens/s",
            f"decode /\n{results[0].name}",
            "weights\nread GB/s",
            "of the\nlimit",
            "compile\ns",
        ),
    )
    for result in results:
        table.add_row(
            result.name,
            f"{result.speed.prefill:,.0f}",
            f"{result.speed.decode:,.0f}",
            f"{result.speed.decode / results[0].speed.decode:.2f}",
            f"{result.read_rate / 1e9:.1f}",
            f"{result.read_rate / result.speed.read_limit:.0%}",
            f"{result.compile_seconds:.1f}",
        )
    return table


def write_json(path: Path, results: Sequence[Result], conditions: Conditions) -> None:
    """Writes all figures in base units: bytes, seconds, nats, tokens a second."""
    figures = {
        "conditions": dataclasses.asdict(conditions),
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    table = Table("", title=title, caption=caption, box=SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _estimate(value: Estimate, factor: float = 1.0) -> str:
    """Prints a mean to the digits that its error, of two significant ones, allows."""
    mean, error = factor * value.mean, factor * value.error
    if error == 0:
        return f"{mean:g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ±{error:.{digits}f}"
