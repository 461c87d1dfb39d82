"""Plots as SVG to stand inside a page: text and shapes take their colors from the page's style."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 640  # of every plot, in user units; the page scales it
CHARACTER = 8.2  # at most the width of one in the page's type, which is 13 units high, on average over a word
NAMES_APART = 17  # from one line to the next


@dataclass(frozen=True)
class Point:
    """x and y are positive; low and high: the ends of y's error bar, positive too; marked: drawn apart from others."""

    name: str
    x: float
    y: float
    low: float
    high: float
    text: str
    marked: bool = False


@dataclass(frozen=True)
class Bar:
    """value and mark, the place of a tick across the bar, share one scale; text stands behind the bar."""

    name: str
    value: float
    text: str
    mark: float | None = None


@dataclass(frozen=True)
class LogScale:
    """Maps positive numbers to places between start and end, by their logarithms."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """The numbers 1, 2 and 5 times a power of ten; of many powers only each power itself."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 3 else (1,)
        return [t for p in powers for d in digits if self.low <= (t := d * 10.0**p) <= self.high]


def scatter(name: str, title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Returns points with error bars on two logarithmic axes; no two names overlap, and a line joins marked points."""
    left, bottom = 70, max(290.0, 30 + NAMES_APART * len(points))
    height = bottom + 50
    xs, ys = [p.x for p in points], [e for p in points for e in (p.low, p.high)]
    x = LogScale(min(xs) / 1.25, max(xs) * 1.25, left, WIDTH - 20)
    y = LogScale(min(ys) / 2, max(ys) * 2, bottom, 30)
    parts = []
    for tick in x.ticks():
        parts += [_line(x(tick), 30, x(tick), bottom, "grid"), _text(x(tick), bottom + 18, f"{tick:g}", "middle")]
    for tick in y.ticks():
        parts += [_line(left, y(tick), WIDTH - 20, y(tick), "grid"), _text(left - 8, y(tick) + 4, f"{tick:g}", "end")]
    parts += [_text((left + WIDTH) / 2, bottom + 40, x_label, "middle"), _text(8, 16, y_label, "start")]
    front = [f"{x(p.x):.1f},{y(p.y):.1f}" for p in sorted(points, key=lambda p: p.x) if p.marked]
    parts += [f'<polyline class="front" points="{" ".join(front)}"/>'] if front else []
    for point, place in zip(points, _spread([y(p.y) for p in points]), strict=True):
        at = x(point.x)
        parts += [_line(at, y(point.low), at, y(point.high), "error")]
        kind = "point marked" if point.marked else "point"
        circle = f'<circle class="{kind}" cx="{at:.1f}" cy="{y(point.y):.1f}" r="5">'
        parts += [f"{circle}<title>{escape(point.text)}</title></circle>"]
        right = at + 12 + CHARACTER * len(point.name) < WIDTH
        parts += [_text(at + 12 if right else at - 12, place + 4, point.name, "start" if right else "end")]
    return _svg(name, title, "; ".join(p.text for p in points), height, parts)


def curves(
    name: str, title: str, x_label: str, y_label: str, series: Sequence[tuple[str, float, Sequence[float]]]
) -> str:
    """Returns lines over a linear axis from 0, their values on a logarithmic one.

    series: a name, the distance from one value to the next, and the values, which are positive; the first lies one
    distance from 0.
    """
    left, bottom = 70, 290.0
    every = [value for _, _, values in series for value in values]
    last = max(apart * len(values) for _, apart, values in series)
    y = LogScale(min(every) / 1.1, max(every) * 1.1, bottom, 30)
    unit = (WIDTH - 20 - left) / last
    parts = []
    for tick in y.ticks():
        parts += [_line(left, y(tick), WIDTH - 20, y(tick), "grid"), _text(left - 8, y(tick) + 4, f"{tick:g}", "end")]
    for tick in (last / 2, last):
        at = left + unit * tick
        parts += [_line(at, 30, at, bottom, "grid"), _text(at, bottom + 18, f"{tick:,.0f}", "end")]
    for number, (_, apart, values) in enumerate(series):
        places = " ".join(f"{left + unit * apart * i:.1f},{y(value):.1f}" for i, value in enumerate(values, 1))
        parts.append(f'<polyline class="curve" style="stroke-dasharray: {2 * number} {number}" points="{places}"/>')
    parts += [_text((left + WIDTH) / 2, bottom + 40, x_label, "middle"), _text(8, 16, y_label, "start")]
    parts += _names([(each, y(values[-1])) for each, _, values in series if each])
    told = "; ".join(f"{each}: {values[0]:.4g} to {values[-1]:.4g}" for each, _, values in series)
    return _svg(name, title, told, bottom + 50, parts)


def _names(places: Sequence[tuple[str, float]]) -> list[str]:
    """Returns names at the right end of curves, none above another."""
    spread = _spread([place - 6 for _, place in places])
    return [_text(WIDTH - 24, place, name, "end") for (name, _), place in zip(places, spread, strict=True)]


def bars(name: str, title: str, groups: Sequence[tuple[str, Sequence[Bar]]], most: float | None = None) -> str:
    """Returns horizontal bars from 0, one below the other; a group with a name begins with it.

    most: the value of a bar as wide as can be; default: the largest.
    """
    every = [bar for _, group in groups for bar in group]
    left = 16 + CHARACTER * max(len(bar.name) for bar in every)
    most = most or max(max(bar.value, bar.mark or 0) for bar in every)
    unit = (WIDTH - left - 12 - CHARACTER * max(len(bar.text) for bar in every)) / most
    parts, top = [], 8.0
    for heading, group in groups:
        if heading:
            parts.append(_text(0, top + 16, heading, "start"))
            top += 24
        for bar in group:
            parts += list(_bar(bar, left, top, unit))
            top += 26
        top += 6
    told = "; ".join(f"{heading} {bar.name}: {bar.text}".strip() for heading, group in groups for bar in group)
    return _svg(name, title, told, top, parts)


def _bar(bar: Bar, left: float, top: float, unit: float) -> Iterator[str]:
    yield _text(left - 8, top + 15, bar.name, "end")
    yield f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{unit * bar.value:.1f}" height="20" rx="2"/>'
    end = bar.value
    if bar.mark is not None:
        yield _line(left + unit * bar.mark, top - 2, left + unit * bar.mark, top + 22, "mark")
        end = max(end, bar.mark)
    yield _text(left + unit * end + 8, top + 15, bar.text, "start")


def _spread(places: Sequence[float], apart: float = NAMES_APART) -> list[float]:
    """Moves places downwards until no two are closer than `apart`."""
    moved, last = list(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        last = moved[i] = max(places[i], last + apart)
    return moved


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(name: str, title: str, told: str, height: float, parts: Sequence[str]) -> str:
    """name: of the element; told: the figures in words, for those who hear the page."""
    opening = f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}" aria-labelledby="{name}-title {name}-told">'
    described = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-told">{escape(told)}</desc>'
    return "\n".join([opening, described, *parts, "</svg>"])
