"""Find the rewrite that breaks a model: run a pipeline up to the n-th rewrite, for fewer and fewer n."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.pipeline import Pipeline, count_rewrites


@dataclasses.dataclass(frozen=True)
class Culprit:
    """The first rewrite with which a graph is bad: its number from 1, the pass that made it, and what it rewrote."""

    number: int
    pass_text: str
    rewrite: str

    def __str__(self) -> str:
        return f"rewrite {self.number}, by {self.pass_text}" + (f": {self.rewrite}" if self.rewrite else "")


def bisect(
    pipeline: Pipeline, graph: Graph, is_bad: Callable[[Graph], bool], calibration: Sequence[Any] = (), seed: int = 0
) -> Culprit:
    """Returns the first rewrite of the pipeline after which `is_bad(graph)` holds.

    Assumes that a graph once bad stays bad, as a bisection does. Raises OptionError where the graph is bad before
    the first rewrite, or good after the last one.
    """

    def upto(limit: int | None) -> Graph:
        return pipeline(graph, calibration=calibration, seed=seed, limit=limit)

    whole = upto(None)
    good, bad = 0, sum(count_rewrites(record) for record in whole.history[len(graph.history) :])
    if is_bad(graph):
        raise OptionError("bisect: the graph is bad before the first rewrite")
    if not is_bad(whole):
        raise OptionError(f"bisect: the graph is good after all {bad} rewrites")
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if is_bad(upto(middle)) else (middle, bad)
    record = upto(bad).history[-1]
    return Culprit(bad, record.name, record.rewrites[-1] if record.rewrites else "")
