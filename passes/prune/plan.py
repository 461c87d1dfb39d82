"""A pruning plan: which indices of which dimensions stay, which layers go, and what that saves."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from xlathe.errors import OptionError
from xlathe.files import replaced

FORMAT = "xlathe prune plan 1"
UNITS = ("parameters", "bytes", "flops")
Kind = Literal["heads", "neurons", "hidden", "experts", "value_dims", "query_key_dims"]
WORDS: Mapping[Kind, str] = {
    "heads": "key-value heads",
    "neurons": "neurons",
    "hidden": "features of the stream",
    "experts": "experts",
    "value_dims": "channels of values",
    "query_key_dims": "channels of queries and keys",
}
SHOWN = 5  # numbers in a message


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes of weights that shrink together.

    kind: `neurons`, `heads` (a key-value head with all query heads that share it), `hidden` (features of the residual
    stream), `experts` (with their rows of the router), `value_dims` (channels of the values of all heads of a layer) or
    `query_key_dims` (channels of queries and keys of all heads, pairs of them where they are rotated).
    axes: (weight, axis) of every weight concerned, in the graph's order; an axis may hold more than this group, as a
    fused projection does: start is the first index on the first axis that is the group's, which tells groups with the
    same axes apart. kept: indices that stay, ascending; scores: of all indices, the higher the more is lost by removing
    one.
    """

    kind: Kind
    size: int
    axes: tuple[tuple[str, int], ...]
    kept: tuple[int, ...]
    scores: tuple[float, ...]
    start: int = 0

    @property
    def name(self) -> str:
        """The first weight concerned and the others by their last names."""
        first, *others = dict.fromkeys(weight for weight, _ in self.axes)
        return " ".join([first, *(f"+ {other}" for other in others)])


@dataclasses.dataclass(frozen=True)
class Cost:
    """Size of a graph: trained numbers, their bytes, and floating point operations a token without attention."""

    parameters: int
    bytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Timed:
    """A shape that a search measured: what it is without, and milliseconds of a decoded token, as predicted (None: of
    the whole graph, by which others are predicted) and as measured."""

    removed: str
    predicted: float | None
    measured: float


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """What `PruneStructured` will do; prints as a table.

    layers: removed layers, by number; influence: of every layer, 1 - cosine between its input and output, or empty.
    tried: what a search measured: what a candidate removes, and its KL in nats a token, best first. notes: what a
    search left alone, and why. timed: what a search within a budget of time measured, in order.
    """

    groups: tuple[Group, ...]
    layers: tuple[int, ...]
    influence: tuple[float, ...]
    before: Cost
    after: Cost
    tried: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    timed: tuple[Timed, ...] = ()

    @property
    def width(self) -> tuple[int, ...] | None:
        """Which features of the residual stream stay, ascending; None where all do."""
        return next((group.kept for group in self.groups if group.kind == "hidden"), None)

    @property
    def removed(self) -> str:
        """What goes, in words: `6 of 24 key-value heads, 576 of 6,144 neurons`; a head goes with its queries."""
        parts = []
        for kind, what in WORDS.items():
            groups = [group for group in self.groups if group.kind == kind]
            size = sum(group.size for group in groups)
            parts += [f"{size - sum(len(group.kept) for group in groups):,} of {size:,} {what}"] if groups else []
        parts += [f"{len(self.layers)} of {len(self.influence)} layers"] if self.layers else []
        return ", ".join(parts) or "nothing"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"
        with replaced(Path(path)) as file:
            file.write(text.encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "PrunePlan":
        """Reads what `save` wrote. Raises OptionError where the file is missing or something else."""
        try:
            return _plan(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise OptionError(f"{os.fspath(path)!r} is no pruning plan: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        lines = [f"{'kind':8} {'kept':>12}  weights"]
        lines += [f"{g.kind:8} {len(g.kept):>5} of {g.size:<4} {g.name}" for g in self.groups]
        if self.layers:
            lines.append(f"{'layers':8} {'removed':>12}  {', '.join(map(str, self.layers))}")
        return "\n".join([*lines, *self.summary])

    @property
    def summary(self) -> list[str]:
        """What a search measured, tried and left alone, and the sizes before and after, a line each."""
        lines = [f"{each.measured:<8.4g} ms{_told(each.predicted)} without {each.removed}" for each in self.timed]
        lines += [*(f"KL {kl:<9.4g} without {what}" for what, kl in self.tried), *self.notes]
        for unit in UNITS:
            old, new = getattr(self.before, unit), getattr(self.after, unit)
            lines.append(f"{unit}: {old:,} -> {new:,} ({new / max(old, 1):.1%})")
        return lines


def _told(predicted: float | None) -> str:
    return "" if predicted is None else f" ({predicted:.4g} predicted)"


def _plan(content: Any) -> PrunePlan:
    """Reads parsed JSON; raises ValueError, KeyError or TypeError where it is no plan."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected an object whose format is {FORMAT!r}")
    layers = _numbers(content["layers"], int)
    if list(layers) != sorted({n for n in layers if n >= 0}):
        raise ValueError(f"layers must be ascending numbers from 0, found {list(layers)[:SHOWN]}")
    before, after = (Cost(*_numbers([content[key][unit] for unit in UNITS], int)) for key in ("before", "after"))
    return PrunePlan(
        tuple(map(_group, content["groups"])), layers, _numbers(content["influence"], float), before, after,
        tuple((str(what), _numbers([kl], float)[0]) for what, kl in content.get("tried", [])),
        tuple(map(str, content.get("notes", []))),
        tuple(map(_timed, content.get("timed", []))),
    )  # fmt: skip


def _timed(content: Any) -> Timed:
    predicted, (measured,) = content["predicted"], _numbers([content["measured"]], float)
    return Timed(str(content["removed"]), None if predicted is None else _numbers([predicted], float)[0], measured)


def _group(content: Any) -> Group:
    kind, size = content["kind"], content["size"]
    if kind not in WORDS or type(size) is not int:
        raise ValueError(f"expected one of {', '.join(WORDS)} and their number, found {kind!r} and {size!r}")
    kept = _numbers(content["kept"], int)
    if not kept or list(kept) != sorted({n for n in kept if 0 <= n < size}):
        raise ValueError(f"kept must be ascending numbers from 0 to {size - 1}, found {list(kept)[:SHOWN]}")
    axes = tuple((str(name), _numbers([axis], int)[0]) for name, axis in content["axes"])
    (start,) = _numbers([content.get("start", 0)], int)
    return Group(kind, size, axes, kept, _numbers(content["scores"], float), start)


def _numbers[N: (int, float)](values: Any, kind: type[N]) -> tuple[N, ...]:
    if not isinstance(values, list) or any(type(v) is not kind for v in values):
        raise ValueError(f"expected a list of {kind.__name__}, found {str(values)[:80]}")
    return tuple(values)
