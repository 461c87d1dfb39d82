"""All shapes that a search may choose from: a grid of fractions of each kind, at every number of layers."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, final

import numpy as np

from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.passes.prune.depth import least, without_layers
from xlathe.passes.prune.groups import Groups, count_kept
from xlathe.passes.prune.plan import Kind

STEPS: Final[Mapping[Kind, int]] = {"heads": 16, "neurons": 64, "hidden": 16, "experts": 16}  # parts of a kind


class Candidate(NamedTuple):
    """A shape. depth: layers removed; number: of its point in the grid; removed: the fraction of each kind that goes;
    features: of the stream; value: of the summed scores, what is kept, as a logarithm."""

    depth: int
    number: int
    removed: dict[Kind, float]
    features: tuple[int, ...]
    value: float

    @property
    def place(self) -> tuple[int, int]:
        """Where it is among all shapes."""
        return self.depth, self.number

    @property
    def width(self) -> tuple[int, ...]:
        """What candidates of a search differ in: layers and features."""
        return self.depth, *self.features


@final
class Shapes:
    """A grid of n shapes for each of the numbers of layers that may go, 0 first.

    graph: whole; counts: how many indices of each atom stay, int64 [n]; kept: logarithms of the shares of scores that
    stay, float64 [n]. Raises PassError where nothing can be cut, with the reasons.
    """

    def __init__(
        self, found: Groups, scores: Mapping[int, np.ndarray], influence: tuple[float, ...], kinds: Sequence[Kind]
    ) -> None:
        self.graph, self.influence = found.graph, influence
        self.cut = [kind for kind in kinds if kind in found.kinds.values()]
        if not self.cut and len(influence) < 2:
            raise PassError("found nothing to prune; " + ("; ".join(found.reasons()) or "no weight is multiplied"))
        steps = [np.arange(STEPS[kind]) / STEPS[kind] for kind in self.cut]
        self.grid = np.array(list(itertools.product(*steps)), float)
        own = {a: self.cut.index(kind) for a, kind in found.kinds.items() if kind in self.cut}
        cuts = {a: _counts(found, a, self.grid[:, i]) for a, i in own.items()}
        self.counts = cuts or {-1: np.ones(len(self.grid), np.int64)}  # no atom: layers alone
        self.kept = _shares(found, scores, cuts, len(self.grid))
        self.stream = [cuts[a] for a, kind in found.kinds.items() if kind == "hidden" and a in cuts]
        which = np.unique(np.array([np.zeros(len(self.grid)), *self.stream]), axis=1, return_inverse=True)[1]
        self.widths = [np.flatnonzero(which == i) for i in range(which.max() + 1)]  # of one width each
        self.depths = range(max(1, len(influence)))

    def without(self, depth: int) -> Graph:
        """The graph without so many layers, otherwise whole."""
        return without_layers(self.graph, least(self.influence, depth))

    def totals(self, each: Iterable[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """Returns what weights sum to in every shape, [n] for each depth. each: names, with numbers [n] of whole depth.

        Weights that go with the same layers are added up first: there may be many more of them than of layers.
        """
        left = [set(self.without(depth).names("weight")) for depth in self.depths]
        sums: dict[tuple[bool, ...], np.ndarray] = {}
        for name, numbers in each:
            where = tuple(name in names for names in left)
            sums[where] = sums[where] + numbers if where in sums else numbers
        nothing = np.zeros(len(self.grid))
        return [sum((total for where, total in sums.items() if where[depth]), nothing) for depth in self.depths]

    def at(self, depth: int, number: int) -> Candidate:
        """Returns one shape."""
        share = sum(sorted(self.influence)[depth:]) / max(sum(self.influence), 1e-30) if self.influence else 1.0
        removed = dict(zip(self.cut, self.grid[number].tolist(), strict=True))
        features = tuple(int(each[number]) for each in self.stream)
        return Candidate(depth, number, removed, features, float(self.kept[number] + np.log(max(share, 1e-30))))

    def best(self, fits: Sequence[np.ndarray]) -> list[Candidate]:
        """Returns the best of the shapes that fit, one a depth and width of the stream; the first is the best.

        fits: bool [n] for each depth.
        """
        found = []
        for depth, allowed in zip(self.depths, fits, strict=True):
            value = np.where(allowed, self.kept, -np.inf)
            for same in self.widths:
                number = int(same[np.argmax(value[same])])
                found += [self.at(depth, number)] if allowed[number] else []
        return sorted(found, key=lambda each: -each.value)


def _counts(found: Groups, atom: int, removed: np.ndarray) -> np.ndarray:
    size, kind = int(found.dims.sizes[atom]), found.kinds[atom]
    known = {fraction: count_kept(kind, size, fraction, found.least(atom)) for fraction in np.unique(removed).tolist()}
    return np.array([known[fraction] for fraction in removed.tolist()], np.int64)


def _shares(found: Groups, scores: Mapping[int, np.ndarray], counts: Mapping[int, np.ndarray], n: int) -> np.ndarray:
    """The sum over kinds of the logarithm of the share of scores that is kept, the mean over the groups of a kind."""
    total = np.zeros(n)
    for kind in dict.fromkeys(found.kinds[atom] for atom in counts):
        atoms = [atom for atom in counts if found.kinds[atom] == kind]
        shares = []
        for atom in atoms:
            sums = np.cumsum(-np.sort(-scores[atom]))
            shares.append(sums[counts[atom] - 1] / max(sums[-1], 1e-30))
        total += np.log(np.maximum(np.mean(shares, axis=0), 1e-30))
    return total
