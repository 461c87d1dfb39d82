"""The shape that a model gets within a budget: candidates from scores, the best of them by what they predict.

Every group of one kind loses the same fraction, so that layers stay alike, and the indices that a candidate keeps are
those with the highest scores: each is a prefix of one order, and scores are made once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, Literal, final, get_args

import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.prune.cost import cost, weight_counts
from xlathe.passes.prune.depth import block_influence, least, without_layers
from xlathe.passes.prune.groups import Groups, choose
from xlathe.passes.prune.latency import Latency, Measure, decode_timer
from xlathe.passes.prune.plan import Kind, PrunePlan
from xlathe.passes.prune.scores import Score, score_groups
from xlathe.passes.prune.shapes import Candidate, Shapes
from xlathe.pipeline import Context
from xlathe.sections import layers
from xlathe.shrink import shrink
from xlathe.verify import compare

Unit = Literal["params", "megabytes", "latency"]
BUDGETS: Final[tuple[Unit, ...]] = get_args(Unit)
TRIED: Final = 8  # candidates whose predictions are compared


@final
@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that may be left: a fraction of the parameters, 10^6 bytes of weights, or milliseconds of a token."""

    unit: Unit
    value: float


def search(
    graph: Graph, budget: Budget, score: Score, kinds: Sequence[Kind], context: Context, measure: Measure = decode_timer
) -> PrunePlan:
    """Returns the plan within the budget that changes predictions on held-out calibration tokens least.

    graph: as `separate` leaves it. kinds: what may be cut, besides layers. Of every number of layers and width of the
    stream the shape that keeps most of the summed scores is a candidate; the best TRIED of them are compared by KL with
    the whole graph on the last quarter of the calibration batches, and scores are of the others.
    A budget of time is met as `measure` finds it, and what misses it is not compared.
    Raises OptionError without two batches or rows of calibration, and for a budget below the smallest shape.
    """
    seen, held = _hold_out(graph, context)
    context = dataclasses.replace(context, calibration=seen)
    influence = block_influence(graph, context) if layers(graph) else ()
    found = Groups(graph)
    scores = score_groups(found, score, context)
    shapes = Shapes(found, scores, influence, kinds)

    def realize(candidate: Candidate) -> tuple[PrunePlan, Graph]:
        return _realize(graph, found, scores, candidate, influence)

    timing = Latency(found, shapes, budget.value, measure) if budget.unit == "latency" else None
    chosen = timing.within(realize, TRIED) if timing else map(realize, _within(found, shapes, budget))
    tried = []
    for number, (plan, small) in enumerate(chosen):
        context.progress(f"candidate {number + 1} of {TRIED} at most", number / TRIED)
        tried.append((_divergence(graph, small, held), plan))
    tried.sort(key=lambda each: each[0])
    best = dataclasses.replace(tried[0][1], tried=tuple((plan.removed, kl) for kl, plan in tried))
    return dataclasses.replace(best, timed=tuple(timing.timed), notes=(timing.note,)) if timing else best


def _within(found: Groups, shapes: Shapes, budget: Budget) -> list[Candidate]:
    """The best of the shapes within a budget of parameters or bytes."""
    graph = found.graph
    names = graph.names("weight")
    unit = {name: 1 if budget.unit == "params" else jnp.dtype(graph.aval(name).dtype).itemsize for name in names}
    whole = sum(int(np.prod(graph.aval(name).shape)) * unit[name] for name in names)
    allowed = budget.value * (whole if budget.unit == "params" else 1e6)
    if allowed >= whole:
        raise OptionError(f"megabytes={budget.value}: the model has {np.ceil(whole / 1e3) / 1e3} already")
    sizes = weight_counts(graph, found.coupling, shapes.counts)
    totals = shapes.totals((name, size * unit[name]) for name, size in sizes)
    best = shapes.best([total <= allowed for total in totals])
    if not best:
        raise OptionError(_too_small(budget, int(min(np.min(total) for total in totals)), whole))
    return best[:TRIED]


def _too_small(budget: Budget, smallest: int, whole: int) -> str:
    if budget.unit == "params":
        least_share = int(np.ceil(smallest / whole * 1e4)) / 1e4
        return f"params={budget.value} cannot be met: the smallest possible is {smallest:,} of {whole:,}, {least_share}"
    return f"megabytes={budget.value} cannot be met: the smallest possible is {np.ceil(smallest / 1e3) / 1e3}"


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
    plan = PrunePlan(tuple(groups), gone, influence, cost(graph, found.coupling, {}), after)
    return plan, shrink(smaller, left.coupling, kept)


def _divergence(graph: Graph, small: Graph, held: Sequence[np.ndarray]) -> float:
    found = [(compare(graph, small, tokens).kl.mean, tokens.size) for tokens in held]
    return sum(kl * n for kl, n in found) / sum(n for _, n in found)
