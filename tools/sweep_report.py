"""What a sweep measured, as a table of text, figures in JSON, a page and a plot."""

import dataclasses
import importlib
import importlib.util
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console

from xlathe.tools.page import document, figure, section
from xlathe.tools.plots import Point, scatter
from xlathe.tools.results import Sheet, estimate_text
from xlathe.tools.sweep_rows import Row

AXES = ("MB of weights", "KL divergence, nats a token")
LEAST = 1e-7  # nats a token: less is what float32 rounds
WIDE = 240  # characters, more than a table has


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a sweep over ways to make a source smaller; protocol: in words."""

    source: str
    protocol: str
    windows: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, object]:
        best = front(self.rows)
        rows = [{**row.to_json(), "front": row.name in best} for row in self.rows]
        return {"source": self.source, "protocol": self.protocol, "windows": self.windows, "rows": rows}


def write_report(report: Report, folder: Path) -> list[str]:
    """Writes table.txt, sweep.json, page.html and, where matplotlib is, plot.png; returns lines that tell so."""
    table, told = as_text(report), []
    (folder / "table.txt").write_text(table, encoding="utf-8")
    (folder / "sweep.json").write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "page.html").write_text(page(report), encoding="utf-8")
    written = ["table.txt", "sweep.json", "page.html"]
    if importlib.util.find_spec("matplotlib") is None:
        told = ["no plot.png: it takes matplotlib, pip install 'xlathe[plots]'; page.html has the plot"]
    elif points(report.rows):
        write_png(points(report.rows), folder / "plot.png")
        written.append("plot.png")
    return [table, f"{folder}: {', '.join(written)}", *told]


def front(rows: Sequence[Row]) -> set[str]:
    """Returns the names of the Pareto front: no other row is as small and as close, and better in one of both."""
    costs = {row.name: (row.figures.bytes, row.figures.quality.kl.mean) for row in rows if row.figures}
    return {
        name
        for name, (size, kl) in costs.items()
        if not any(s <= size and k <= kl and (s, k) != (size, kl) for s, k in costs.values())
    }


HEADINGS = (
    *("KL\n10⁻³", "KL\nmedian", "KL\n99 %", "perplexity", "same\ntop-1 %", "RMS\nΔp %"),
    *("bits a\nweight", "MB", "s", "peak\nMB", "front"),
)


def cells(row: Row, best: set[str]) -> tuple[str, ...]:
    """Returns the text of a row below `HEADINGS`; one without figures has a word and nothing more."""
    found = row.figures
    if found is None:
        return ("failed", *[""] * (len(HEADINGS) - 1))
    quality = found.quality
    return (
        estimate_text(quality.kl, 1e3),
        estimate_text(quality.kl_median, 1e3),
        estimate_text(quality.kl_tail, 1e3),
        estimate_text(quality.perplexity),
        estimate_text(quality.same_top1, 100),
        estimate_text(quality.delta_p_rms, 100),
        f"{found.bits_per_weight:.2f}",
        f"{found.bytes / 1e6:.2f}",
        f"{found.seconds:.1f}",
        f"{found.peak / 1e6:,.0f}",
        "*" if row.name in best else "",
    )


def caption(report: Report) -> str:
    """Says what the columns of the table are."""
    known = next((row.figures.quality.base_perplexity for row in report.rows if row.figures), None)
    base = f", whose perplexity is {estimate_text(known)}" if known else ""
    return (
        f"KL divergence in 10⁻³ nats a token from {report.source}{base}; {report.windows} windows, {report.protocol}; "
        "± standard error; MB and bits of the weights with their scales, of the model as it was trained; seconds of "
        "passes and writing, and the peak of that process's memory, mapped files included; * nothing else is both as "
        "small and as close"
    )


def sheet(report: Report) -> Sheet:
    best = front(report.rows)
    rows = tuple((row.name, *cells(row, best)) for row in report.rows)
    return Sheet(f"Ways to make {report.source} smaller", caption(report), HEADINGS, rows)


def as_text(report: Report) -> str:
    """Returns the table, and what went wrong below it."""
    console = Console(width=WIDE, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(sheet(report).as_table())
    lines = [line.rstrip() for line in captured.get().strip("\n").splitlines()]
    return "\n".join([*lines, *(f"{row.name}: {row.error}" for row in report.rows if row.error)]) + "\n"


def points(rows: Sequence[Row]) -> list[Point]:
    """Returns what a plot shows: rows that differ from the source by more than rounding."""
    best, found = front(rows), []
    for row in rows:
        if row.figures is None or not LEAST <= row.figures.quality.kl.mean < math.inf:
            continue
        kl, megabytes = row.figures.quality.kl, row.figures.bytes / 1e6
        text = f"{row.name}: {megabytes:.2f} MB, {estimate_text(kl, 1e3)} 10⁻³ nats a token"
        low, high = max(kl.mean - kl.error, kl.mean / 10), kl.mean + kl.error
        found.append(Point(row.name, megabytes, kl.mean, low, high, text, row.name in best))
    return found


def page(report: Report) -> str:
    """Returns the page; every text in it that is not its own is escaped."""
    shown = points(report.rows)
    title = f"Ways to make {report.source} smaller"
    plot = shown and figure(
        scatter("sweep", title, *AXES, shown),
        "Further left is smaller, further down is closer. Bars: one standard error. Joined: what nothing else beats in "
        "both; at the bottom left of all are ways that change nothing but rounding, which are not shown.",
    )
    ways = "\n".join(f"<dt>{escape(row.name)}</dt><dd><code>{escape(row.way)}</code></dd>" for row in report.rows)
    errors = "\n".join(
        f"<dt>{escape(row.name)}</dt><dd>{escape(row.error)}</dd>" for row in report.rows if row.error
    )
    return document(
        f"xlathe sweep {report.source}",
        [
            section(sheet(report), plot or ""),
            f"<section><h2>Failed</h2>\n<dl>{errors}</dl></section>" if errors else "",
            f"<section><h2>Pipelines</h2>\n<dl>{ways}</dl></section>",
        ],
    )


def write_png(shown: Sequence[Point], path: Path) -> None:
    """Draws the plot with matplotlib, without a screen."""
    drawing = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.add_subplot(xscale="log", yscale="log", xlabel=AXES[0], ylabel=AXES[1])
    for point in shown:
        errors = [[point.y - point.low], [point.high - point.y]]
        color = "tab:orange" if point.marked else "tab:blue"
        axes.errorbar(point.x, point.y, yerr=errors, fmt="o", color=color)
        axes.annotate(point.name, (point.x, point.y), xytext=(6, 3), textcoords="offset points", fontsize=8)
    best = sorted((p.x, p.y) for p in shown if p.marked)
    axes.plot(*zip(*best, strict=True), linestyle="--", linewidth=1, color="tab:orange")
    axes.grid(which="both", alpha=0.25)
    drawing.savefig(path, dpi=150)
