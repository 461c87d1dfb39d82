"""The demo's report as one page: no file beside it, nothing fetched, no script."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from xlathe.tools.plots import Bar, Point, bars, scatter
from xlathe.tools.results import Report, Result, Sheet, estimate_text, sheets

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fff; --soft: #5b6578; --rule: #d8dde6; --hue: #2463c9;
  --mark: #c2410c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --paper: #14171e; --soft: #a3adbf; --rule: #343b49;
  --hue: #6ea1ff; --mark: #ff9457 } }
body { margin: 2rem auto; max-width: 54rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2.5rem }
p, caption, figcaption, dd { color: var(--soft) }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { caption-side: bottom; text-align: left; font-size: .875rem; padding-top: .5rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
th:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: pre-line }
td.words { white-space: normal }
figure { margin: 1rem 0 }
figcaption { font-size: .875rem }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif; fill: var(--ink) }
.grid { stroke: var(--rule) }
.error { stroke: var(--hue); stroke-width: 2 }
.point, .bar { fill: var(--hue) }
.front { fill: none; stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3 }
.curve { fill: none; stroke: var(--hue); stroke-width: 1.5 }
.marked { fill: var(--mark) }
.mark { stroke: var(--mark); stroke-width: 3 }
pre { overflow-x: auto; padding: .75rem 1rem; border: 1px solid var(--rule); border-radius: .4rem; line-height: 1.35 }
code { overflow-wrap: anywhere }
"""


def write_page(path: Path, report: Report) -> None:
    """Writes the report as HTML."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """Returns the page; every text in it that is not its own is escaped."""
    size, quality, speed, speculation = sheets(report)
    conditions = report.conditions
    sections = [
        "<h1>What each pipeline costs and gains</h1>",
        f"<p>The demo of xlathe on {escape(conditions.date)}: {escape(conditions.machine)}.</p>",
        section(size),
        section(quality, _cost(report.results)),
        section(speed, _decoding(report.results)),
        section(speculation, _acceptance(report)) if report.drafted else "",
        _completions(report),
        _pipelines(report),
    ]
    return document("xlathe demo", sections)


def document(title: str, sections: Sequence[str]) -> str:
    """Returns a page of sections, which are HTML; the title is not."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>',
            "<body><main>",
            *sections,
            "</main></body></html>\n",
        ]
    )


def section(sheet: Sheet, figure: str = "") -> str:
    """Returns the HTML of a table, after a figure of it."""
    return f"<section><h2>{escape(sheet.title)}</h2>\n{figure}\n{_table(sheet)}</section>"


def _table(sheet: Sheet) -> str:
    headings = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in sheet.headings)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, *cells in sheet.rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(sheet.caption)}</caption>\n<thead><tr><td></td>{headings}</tr>'
        f"</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = ' class="words"' if any(c.isalpha() for c in text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def figure(svg: str, caption: str) -> str:
    """Returns the HTML of a plot and what it shows."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption></figure>"


def _cost(results: Sequence[Result]) -> str:
    first, *others = results
    points = [_point(each) for each in others if each.quality.kl.mean > 0]
    if not points:
        return ""
    title = f"KL divergence from {first.name} over size"
    return figure(
        scatter("cost", title, "MB on disk", "KL divergence, nats a token", points),
        f"{title}: further left is smaller, further down is closer; {first.name} itself has "
        f"{first.disk_bytes / 1e6:.2f} MB and a divergence of 0. Bars: one standard error.",
    )


def _point(result: Result) -> Point:
    kl, megabytes = result.quality.kl, result.disk_bytes / 1e6
    low = max(kl.mean - kl.error, kl.mean / 10)
    text = f"{result.name}: {megabytes:.2f} MB, {estimate_text(kl, 1e3)} 10⁻³ nats a token"
    return Point(result.name, megabytes, kl.mean, low, kl.mean + kl.error, text)


def _decoding(results: Sequence[Result]) -> str:
    lines = [Bar(r.name, r.speed.decode, f"{r.speed.decode:,.0f} of {r.limit:,.0f}", r.limit) for r in results]
    return figure(
        bars("decoding", "Tokens a second while decoding, and the limit of reading", [("", lines)]),
        "Tokens a second while decoding; the mark is where reading the weights alone would be.",
    )


def _acceptance(report: Report) -> str:
    groups = [
        (d.name, [Bar(f"place {i}", share, f"{share:.0%}") for i, share in enumerate(d.acceptance, 1)])
        for d in report.drafted
    ]
    return figure(
        bars("acceptance", "Accepted drafts by place", groups, most=1.0),
        "Accepted drafts of those offered, by their place: a draft after one that fell does not stand.",
    )


def _completions(report: Report) -> str:
    prompt = escape(report.conditions.prompt)
    texts = "\n".join(
        f"<h3>{escape(r.name)}</h3>\n<pre><b>{prompt}</b>{escape(r.completion)}</pre>" for r in report.results
    )
    return f"<section><h2>Completions</h2>\n{texts}</section>"


def _pipelines(report: Report) -> str:
    conditions = report.conditions
    items = "\n".join(
        f"<dt>{escape(r.name)}</dt><dd><code>{escape(r.passes)}</code></dd>" for r in report.results
    )
    calibrated = (
        f"<p>Passes that calibrate saw the first {conditions.length} tokens of "
        f"{escape(', '.join(conditions.calibration))}; none of these files is held out.</p>"
        if conditions.calibration
        else ""
    )
    return f"<section><h2>Pipelines</h2>\n<dl>{items}</dl>\n{calibrated}</section>"
