"""The shape that a model gets within a budget: candidates from scores, the best of them by what they predict.

Every group of one kind loses the same fraction, so that layers stay alike, and the indices that a candidate keeps are
those with the highest scores: each is a prefix of one order, and scores are made once.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, final

import jax.numpy as jnp
import numpy as np

from xlathe.coupling import couple
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.passes.prune.cost import cost, weight_counts
from xlathe.passes.prune.depth import block_influence, without_layers
from xlathe.passes.prune.groups import Groups, choose, count_kept
from xlathe.passes.prune.plan import Kind, PrunePlan
from xlathe.passes.prune.scores import Score, score_groups
from xlathe.pipeline import Context
from xlathe.sections import layers
from xlathe.shrink import shrink
from xlathe.verify import compare

TRIED: Final = 8  # candidates whose predictions are compared
STEPS: Final[Mapping[Kind, int]] = {"heads": 16, "neurons": 64, "hidden": 16, "experts": 16}  # parts of a kind


@final
@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that may be left: a fraction of the parameters, or 10^6 bytes of weights."""

    unit: Literal["params", "megabytes"]
    value: float


class Candidate(NamedTuple):
    depth: int  # layers removed
    removed: dict[Kind, float]
    value: float  # of the summed scores, what is kept, as a logarithm


def search(graph: Graph, budget: Budget, score: Score, kinds: Sequence[Kind], context: Context) -> PrunePlan:
    """Returns the plan within the budget that changes predictions on held-out calibration tokens least.

    graph: as `separate` leaves it. kinds: what may be cut, besides layers. Of every number of layers and width of the
    stream the shape that keeps most of the summed scores is a candidate; the best TRIED of them are compared by KL with
    the whole graph on the last quarter of the calibration batches, and scores are of the others.
    Raises OptionError without two batches or rows of calibration, and for a budget below the smallest shape.
    """
    seen, held = _hold_out(graph, context)
    context = dataclasses.replace(context, calibration=seen)
    influence = block_influence(graph, context) if layers(graph) else ()
    found = Groups(graph)
    scores = score_groups(found, score, context)
    candidates = _candidates(found, scores, influence, budget, kinds)
    tried = []
    for number, candidate in enumerate(candidates):
        context.progress(f"candidate {number + 1} of {len(candidates)}", number / len(candidates))
        plan, small = _realize(graph, found, scores, candidate, influence)
        tried.append((_divergence(graph, small, held), plan))
    tried.sort(key=lambda each: each[0])
    return dataclasses.replace(tried[0][1], tried=tuple((plan.removed, kl) for kl, plan in tried))


def least(influence: tuple[float, ...], count: int) -> tuple[int, ...]:
    """Returns the layers that change the stream least; raises OptionError where none would stay."""
    if count and count >= len(influence):
        raise OptionError(f"layers={count} of {len(influence)} layers cannot go: at least one must stay")
    return tuple(sorted(int(i) for i in np.argsort(influence, kind="stable")[:count]))


def _hold_out(graph: Graph, context: Context) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Batches for scores, and tokens [b, t] to compare candidates on."""
    batches = [graph.check_batch(batch) for batch in context.calibration]
    rows = [{name: array[i : i + 1] for name, array in b.items()} for b in batches for i in range(len(b["tokens"]))]
    if len(rows) < 2:
        raise OptionError(
            f"a budget needs two rows of calibration tokens or more, found {len(rows)}: "
            "pipeline(graph, calibration=batches) or --calibration=FILE"
        )
    count = max(1, len(rows) // 4)
    return rows[:-count], [row["tokens"] for row in rows[-count:]]


def _candidates(
    found: Groups,
    scores: Mapping[int, np.ndarray],
    influence: tuple[float, ...],
    budget: Budget,
    kinds: Sequence[Kind],
) -> list[Candidate]:
    """The best of those that fit, one a depth and width of the stream."""
    graph, cut = found.graph, [kind for kind in kinds if kind in found.kinds.values()]
    steps = [np.arange(STEPS[kind]) / STEPS[kind] for kind in cut]
    if not cut and len(influence) < 2:
        raise PassError("found nothing to prune; " + ("; ".join(found.reasons()) or "no weight is multiplied"))
    grid = np.array(list(itertools.product(*steps)), float)
    counts = {a: _counts(found, a, grid[:, cut.index(kind)]) for a, kind in found.kinds.items() if kind in cut}
    sizes = weight_counts(graph, found.coupling, counts or {-1: np.ones(len(grid), np.int64)})
    unit = {name: 1 if budget.unit == "params" else jnp.dtype(graph.aval(name).dtype).itemsize for name in sizes}
    whole = sum(int(np.prod(graph.aval(name).shape)) * unit[name] for name in sizes)
    allowed = budget.value * (whole if budget.unit == "params" else 1e6)
    if allowed >= whole:
        raise OptionError(f"megabytes={budget.value}: the model has {np.ceil(whole / 1e3) / 1e3} already")
    kept = _shares(found, scores, counts, len(grid))
    stream = [counts[atom] for atom, kind in found.kinds.items() if kind == "hidden" and atom in counts]
    best: dict[tuple[int, ...], Candidate] = {}
    smallest = whole
    for depth in range(max(1, len(influence))):
        names = without_layers(graph, least(influence, depth)).names("weight")
        total = sum(sizes[name] * unit[name] for name in names)
        smallest = min(smallest, int(np.min(total)))
        share = sum(sorted(influence)[depth:]) / max(sum(influence), 1e-30) if influence else 1.0
        for i in np.flatnonzero(total <= allowed):
            removed = dict(zip(cut, grid[i].tolist(), strict=True))
            candidate = Candidate(depth, removed, float(kept[i] + np.log(max(share, 1e-30))))
            key = depth, *(int(width[i]) for width in stream)
            if key not in best or candidate.value > best[key].value:
                best[key] = candidate
    if not best:
        raise OptionError(_too_small(budget, smallest, whole))
    return sorted(best.values(), key=lambda each: -each.value)[:TRIED]


def _too_small(budget: Budget, smallest: int, whole: int) -> str:
    if budget.unit == "params":
        least_share = int(np.ceil(smallest / whole * 1e4)) / 1e4
        return f"params={budget.value} cannot be met: the smallest possible is {smallest:,} of {whole:,}, {least_share}"
    return f"megabytes={budget.value} cannot be met: the smallest possible is {np.ceil(smallest / 1e3) / 1e3}"


def _counts(found: Groups, atom: int, removed: np.ndarray) -> np.ndarray:
    size, kind = int(found.dims.sizes[atom]), found.kinds[atom]
    known = {fraction: count_kept(kind, size, fraction, found.least(atom)) for fraction in np.unique(removed).tolist()}
    return np.array([known[fraction] for fraction in removed.tolist()], np.int64)


def _shares(
    found: Groups, scores: Mapping[int, np.ndarray], counts: Mapping[int, np.ndarray], n: int
) -> np.ndarray:
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


def _realize(
    graph: Graph,
    found: Groups,
    scores: Mapping[int, np.ndarray],
    candidate: Candidate,
    influence: tuple[float, ...],
) -> tuple[PrunePlan, Graph]:
    gone = least(influence, candidate.depth)
    smaller = without_layers(graph, gone)
    left = Groups(smaller)
    of = {
        (kind, place, found.start(a, place), found.dims.sizes[a]): a
        for a, kind in found.kinds.items()
        for place in found.axes[a]
    }
    first = {a: left.axes[a][0] for a in left.kinds}
    keys = {a: (left.kinds[a], place, left.start(a, place), left.dims.sizes[a]) for a, place in first.items()}
    known = {a: scores[of[key]] for a, key in keys.items() if key in of}  # others were blocked by a layer that is gone
    groups, kept = choose(left, known, candidate.removed)
    after = cost(smaller, left.coupling, kept)
    plan = PrunePlan(tuple(groups), gone, influence, cost(graph, couple(graph), {}), after)
    return plan, shrink(smaller, left.coupling, kept)


def _divergence(graph: Graph, small: Graph, held: Sequence[np.ndarray]) -> float:
    found = [(compare(graph, small, tokens).kl.mean, tokens.size) for tokens in held]
    return sum(kl * n for kl, n in found) / sum(n for _, n in found)
