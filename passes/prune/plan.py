"""A pruning plan: which indices of which dimensions stay, which layers go, and what that saves."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

from xlathe.errors import OptionError

FORMAT = "xlathe prune plan 1"


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes of weights that shrink together.

    kind: `neurons`, or `heads` (a key-value head with all query heads that share it). axes: (weight, axis) of every
    weight concerned, in the graph's order; an axis may hold more than this group, as a fused projection does.
    kept: indices that stay, ascending; scores: of all indices, the higher the more is lost by removing one.
    """

    kind: Literal["heads", "neurons"]
    size: int
    axes: tuple[tuple[str, int], ...]
    kept: tuple[int, ...]
    scores: tuple[float, ...]

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
class PrunePlan:
    """What `PruneStructured` will do; prints as a table.

    layers: removed layers, by number; influence: of every layer, 1 - cosine between its input and output, or empty.
    """

    groups: tuple[Group, ...]
    layers: tuple[int, ...]
    influence: tuple[float, ...]
    before: Cost
    after: Cost

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "PrunePlan":
        """Reads what `save` wrote. Raises OptionError where the file is missing or something else."""
        try:
            return _plan(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{os.fspath(path)!r} is no pruning plan: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        lines = [f"{'kind':8} {'kept':>12}  weights"]
        lines += [f"{g.kind:8} {len(g.kept):>5} of {g.size:<4} {g.name}" for g in self.groups]
        if self.layers:
            lines.append(f"{'layers':8} {'removed':>12}  {', '.join(map(str, self.layers))}")
        for unit in ("parameters", "bytes", "flops"):
            old, new = getattr(self.before, unit), getattr(self.after, unit)
            lines.append(f"{unit}: {old:,} -> {new:,} ({new / old:.1%})")
        return "\n".join(lines)


def _plan(content: dict[str, Any]) -> PrunePlan:
    if content.pop("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    groups = []
    for group in content["groups"]:
        axes = tuple((str(name), int(axis)) for name, axis in group.pop("axes"))
        groups.append(Group(axes=axes, kept=tuple(group.pop("kept")), scores=tuple(group.pop("scores")), **group))
    return PrunePlan(
        tuple(groups),
        tuple(content["layers"]),
        tuple(content["influence"]),
        Cost(**content["before"]),
        Cost(**content["after"]),
    )
