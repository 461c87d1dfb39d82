"""How long one decoded token takes: measured, and predicted for shapes that nobody has compiled.

A token at batch 1 reads every weight once, and the keys and values of the tokens before it. A line through what was
measured in the same run, in bytes read and in layers, says which shapes are worth measuring.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, final

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.prune.cost import cache_reads, weight_reads
from xlathe.passes.prune.groups import Groups
from xlathe.passes.prune.plan import PrunePlan, Timed
from xlathe.passes.prune.shapes import Candidate, Shapes

UNIT: Final = 16  # tokens between two looks at the clock
ROUNDS: Final = 9
Timer = Callable[[], float]
Measure = Callable[[Graph], Timer]
"""Prepares a forward graph, so that each call decodes some tokens and returns the milliseconds of one."""
Realize = Callable[[Candidate], tuple[PrunePlan, Graph]]


def decode_timer(graph: Graph, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Compiles the decoding of a graph for this process's device, and returns what times UNIT tokens of one row.

    The loop is the one that `xlathe.compile` serves the graph with, at batch 1; the tokens are the last ones that the
    cache has room for (`graph.max_len`), so that all of it is read. clock: in seconds.
    """
    from xlathe.aot import STOP_TOKENS, Buckets, served_state, to_step, units  # they import passes
    from xlathe.decode.logits import Sampling
    from xlathe.decode.units import NO_TOKEN, Rows
    from xlathe.offline import target_here
    from xlathe.program import compile_unit
    from xlathe.step import first_state

    step = to_step(graph)
    buckets = Buckets.of(1, graph.max_len, min(UNIT, graph.max_len), (1,))
    unit = next(units(step, buckets, target_here().name))
    decode, arrays = compile_unit(unit.function, unit.signature.avals), step.arrays
    before, tokens = buckets.slots - buckets.unit, jnp.asarray([buckets.unit], jnp.int32)
    rows = Rows(jnp.zeros((1, step.vocab)), jnp.asarray([before], jnp.int32), jnp.ones(1, bool), tokens)
    sampling, stops = Sampling.of(1), jnp.full(STOP_TOKENS, NO_TOKEN, jnp.int32)
    state = [first_state(served_state(step, buckets, 1, None))]  # updated in place

    def run() -> float:
        start = clock()
        made, _, state[0] = decode(arrays, rows, sampling, stops, tokens[0], state[0])
        jax.block_until_ready(made)
        return 1e3 * (clock() - start) / buckets.unit

    return run


@final
@dataclasses.dataclass(frozen=True)
class Point:
    """A shape that was measured: layers, bytes that a token reads, milliseconds."""

    layers: int
    reads: float
    ms: float


def predict(points: Sequence[Point], layers: int, reads: np.ndarray) -> np.ndarray:
    """Returns the milliseconds of shapes with so many layers, float64 as `reads`: what is fixed, and what a layer and a
    byte take, none below zero, with the least squared relative error at the points (Lawson and Hanson's NNLS)."""
    known = np.array([[1.0, point.layers, point.reads] for point in points])
    scale = np.abs(known).max(0) + 1e-30
    rows = known / scale / np.array([[point.ms] for point in points])
    fixed, layer, byte = scipy.optimize.nnls(rows, np.ones(len(points)))[0] / scale
    return np.asarray(fixed + layer * layers + byte * reads)


@final
class Latency:
    """The shapes of a search by the time that they take.

    ms: what a token may take; measure: how that is found out. A shape's time is its share of the whole graph's, the
    median of ROUNDS in which both take turns, times the whole graph's, the lower quartile of all so far.
    `timed`: what was measured, in order, the whole graph first; the line that predicts goes through all of it.
    """

    def __init__(self, found: Groups, shapes: Shapes, ms: float, measure: Measure) -> None:
        self.shapes, self.ms, self.measure, self.whole = shapes, ms, measure, measure(shapes.graph)
        self.layers = [len(shapes.depths) - depth for depth in shapes.depths]
        self.reads = list(self._reads(found))
        self.points: list[Point] = []
        self.timed: list[Timed] = []
        self.wholes: list[float] = []  # milliseconds of the whole graph, throughout

    def within(self, realize: Realize, wanted: int) -> Iterator[tuple[PrunePlan, Graph]]:
        """Yields up to `wanted` shapes that meet the budget, of up to twice as many that are measured.

        realize: makes the plan and the graph of a shape. The smallest shape is measured before any other, and is what
        remains where all others miss. Raises OptionError where the whole graph meets the budget already, or the
        smallest shape misses it.
        """
        self.whole()
        for _ in range(ROUNDS):
            self._time_whole()
        self._keep(self.shapes.at(0, 0), "nothing", None, self._whole_ms())
        self._check_whole()
        smallest = self._smallest()
        last = realize(smallest)
        if not self._meets(smallest, *last):
            raise OptionError(
                f"latency={self.ms} cannot be met: a token takes {self.timed[-1].measured:.4g} ms in the smallest "
                f"shape, {self._whole_ms():.4g} ms in the whole model"
            )
        seen, met = {smallest.place}, set[tuple[int, ...]]()
        for _ in range(2 * wanted):
            new = (each for each in self._candidates() if each.width not in met and each.place not in seen)
            candidate = next(new, None)
            if candidate is None or len(met) == wanted:
                break
            seen.add(candidate.place)
            plan, small = realize(candidate)
            if self._meets(candidate, plan, small):
                met.add(candidate.width)
                yield plan, small
        self._check_whole()
        if not met:
            yield last

    def _check_whole(self) -> None:
        if self._whole_ms() <= self.ms:
            raise OptionError(f"latency={self.ms}: a token takes {self._whole_ms():.4g} ms already")

    @property
    def note(self) -> str:
        """What a plan says of its budget."""
        return (
            f"latency={self.ms}: milliseconds of a token at batch 1 with a full cache of {self.shapes.graph.max_len} "
            "tokens, as measured: another machine or load gives other times, and may give another plan"
        )

    def _reads(self, found: Groups) -> Iterator[np.ndarray]:
        """The bytes that a token of every shape reads, float64 [n] for each depth."""
        weights = self.shapes.totals(weight_reads(found.graph, found.coupling, self.shapes.counts))
        cache = cache_reads(found.graph, found.coupling, self.shapes.counts)
        for total, layers in zip(weights, self.layers, strict=True):
            yield total + cache * layers / self.layers[0]

    def _smallest(self) -> Candidate:
        depth = int(np.argmin([reads.min() for reads in self.reads]))
        return self.shapes.at(depth, int(np.argmin(self.reads[depth])))

    def _candidates(self) -> list[Candidate]:
        return self.shapes.best([self._predicted(depth) <= self.ms for depth in self.shapes.depths])

    def _predicted(self, depth: int) -> np.ndarray:
        """The line, made to go through the last shape that was measured with as many layers."""
        line = predict(self.points, self.layers[depth], self.reads[depth])
        last = next((point for point in reversed(self.points) if point.layers == self.layers[depth]), None)
        if last is None:
            return line
        return line * (last.ms / float(predict(self.points, last.layers, np.array(last.reads))))

    def _time_whole(self) -> float:
        self.wholes.append(self.whole())
        return self.wholes[-1]

    def _whole_ms(self) -> float:
        """The quartile of all times so far: what runs beside a search makes some of them longer, and none shorter."""
        return float(np.quantile(self.wholes, 0.25))

    def _meets(self, shape: Candidate, plan: PrunePlan, small: Graph) -> bool:
        """Times a shape in turn with the whole graph, which tells a slow shape from a machine that has become slow."""
        predicted = float(self._predicted(shape.depth)[shape.number])
        timer = self.measure(small)
        timer()
        share = np.median([timer() / self._time_whole() for _ in range(ROUNDS)])
        whole = self._whole_ms()
        self.timed[0] = dataclasses.replace(self.timed[0], measured=whole)
        self.points[0] = dataclasses.replace(self.points[0], ms=whole)
        return self._keep(shape, plan.removed, predicted, float(share) * whole) <= self.ms

    def _keep(self, shape: Candidate, removed: str, predicted: float | None, ms: float) -> float:
        self.points.append(Point(self.layers[shape.depth], float(self.reads[shape.depth][shape.number]), ms))
        self.timed.append(Timed(removed, predicted, ms))
        return ms
