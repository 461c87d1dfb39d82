"""What the demo measured: figures, and the sheets of them that its tables and its page show."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from xlathe.tools.measure import Speed
from xlathe.tools.quality import Quality
from xlathe.tools.speculation import Drafted
from xlathe.verify import Estimate


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one pipeline.

    removed: what pruning removed, in words; disk_bytes: of the bundle's weight file; read_bytes: weights that decoding
    one token reads; cache_bytes: a token; compile_seconds: for all programs of the bundle; completion: of the prompt.
    """

    name: str
    passes: str
    removed: str
    disk_bytes: int
    read_bytes: int
    bits_per_weight: float
    cache_bytes: float
    quality: Quality
    speed: Speed
    compile_seconds: float
    completion: str

    @property
    def read_rate(self) -> float:
        """Bytes of weights a second while decoding."""
        return self.read_bytes * self.speed.decode

    @property
    def limit(self) -> float:
        """Tokens a second if reading the weights were all that decoding does."""
        return self.speed.read_limit / self.read_bytes


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What was measured: quality on windows x length tokens, speed on one row in so many rounds.

    calibration: names of the files whose first `length` tokens passes calibrated on.
    """

    date: str
    machine: str
    prompt: str
    calibration: tuple[str, ...]
    windows: int
    length: int
    rounds: int
    prompt_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything; the first result is the one that others are compared with."""

    conditions: Conditions
    results: tuple[Result, ...]
    drafted: tuple[Drafted, ...]

    def write_json(self, path: Path) -> None:
        """Writes all figures in base units: bytes, seconds, nats, tokens a second."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table of text; the first column names the rows and has no heading."""

    title: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def as_table(self) -> Table:
        table = Table("", title=self.title, caption=self.caption, box=SIMPLE_HEAD)
        table.title_justify = table.caption_justify = "left"
        for heading in self.headings:
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


def sheets(report: Report) -> tuple[Sheet, ...]:
    conditions = report.conditions
    prompts = f"{conditions.windows} held-out prompts of {conditions.length // 4} tokens, as many new ones, greedy"
    return (
        size_sheet(report),
        quality_sheet(report),
        speed_sheet(report),
        speculation_sheet(report.drafted, prompts),
    )


def size_sheet(report: Report) -> Sheet:
    return Sheet(
        "Size",
        "MB of the weight file; bits a weight of the model as it was trained; bytes of the cache a token",
        ("MB on\ndisk", "bits a\nweight", "cache\nbytes", "compile\ns", "removed"),
        tuple(
            (
                r.name,
                f"{r.disk_bytes / 1e6:.2f}",
                f"{r.bits_per_weight:.2f}",
                f"{r.cache_bytes:,.0f}",
                f"{r.compile_seconds:.1f}",
                r.removed,
            )
            for r in report.results
        ),
    )


def quality_sheet(report: Report) -> Sheet:
    conditions = report.conditions
    return Sheet(
        "Quality",
        f"{conditions.windows * conditions.length:,} held-out tokens in {conditions.windows} windows, read through the "
        f"cache by the kernels that serve; ± standard error over windows; KL divergence in 10⁻³ nats a token",
        ("perplexity", f"KL from\n{report.results[0].name}", "same\ntop-1 %"),
        tuple(
            (
                r.name,
                estimate_text(r.quality.perplexity),
                estimate_text(r.quality.kl, 1e3),
                estimate_text(r.quality.same_top1, 100),
            )
            for r in report.results
        ),
    )


def speed_sheet(report: Report) -> Sheet:
    conditions, first = report.conditions, report.results[0]
    return Sheet(
        "Speed",
        f"one row, prompt of {conditions.prompt_tokens} tokens, {conditions.new_tokens} new ones, median of "
        f"{conditions.rounds} rounds; the limit is plain reading of as many bytes; {conditions.machine}",
        (
            "prefill\ntokens/s",
            "decode\ntokens/s",
            f"decode /\n{first.name}",
            "weights\nread GB/s",
            "of the\nlimit",
        ),
        tuple(
            (
                r.name,
                f"{r.speed.prefill:,.0f}",
                f"{r.speed.decode:,.0f}",
                f"{r.speed.decode / first.speed.decode:.2f}",
                f"{r.read_rate / 1e9:.1f}",
                f"{r.speed.decode / r.limit:.0%}",
            )
            for r in report.results
        ),
    )


def speculation_sheet(drafted: Sequence[Drafted], caption: str) -> Sheet:
    """caption: the prompts."""
    return Sheet(
        "Speculation",
        f"{caption}; the ratio of speeds is a median over prompts; accepted are drafts, by their place; where the text "
        f"is the same, the KL divergence is the pipeline's own",
        ("plain\ntok/s", "drafted\ntok/s", "ratio", "tokens\na step", "accepted %", "same\ntext"),
        tuple(
            (
                d.name,
                f"{d.plain:,.0f}",
                f"{d.decode:,.0f}",
                f"{d.ratio:.2f}",
                f"{d.tokens_per_step:.2f}",
                " ".join(f"{100 * share:.0f}" for share in d.acceptance),
                f"{d.same_text}/{d.prompts}",
            )
            for d in drafted
        ),
    )


def estimate_text(value: Estimate, factor: float = 1.0) -> str:
    """Prints a mean to the digits that its error, of two significant ones, allows."""
    mean, error = factor * value.mean, factor * value.error
    if error == 0 or not math.isfinite(error):
        return f"{mean:g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ±{error:.{digits}f}"
