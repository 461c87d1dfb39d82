"""The contract of a pass, and pipelines of them.

A pass is a frozen dataclass whose fields are its options. It maps a graph to a graph and says what it relies on:

* `needs` and `gives`: predicates on graphs, checked before and after on every run;
* `keeps`: how equal the result is to the input, checked on sampled tokens under `verify=`.
"""

import abc
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, final

from xlathe import jaxpr as ir
from xlathe.errors import PassError
from xlathe.graph import Graph, Record

Predicate = Callable[[Graph], str | None]
"""Returns None where the graph has the property, else a sentence that says what is missing."""


@dataclasses.dataclass(frozen=True)
class Keeps:
    """How equal a pass's result is: max |difference| / max |logits| <= rtol in float32.

    rtol 0 demands equal bits. `None` promises nothing about values (a lossy pass is judged by its metrics).
    """

    rtol: float | None


EXACT = Keeps(0.0)
REASSOCIATED = Keeps(1e-5)
APPROXIMATE = Keeps(None)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pass may know beside the graph.

    calibration: batches of int32 tokens [b, t]; seed: for passes that draw numbers; progress: called with a
    description and the fraction done.
    """

    calibration: Sequence[Any] = ()
    seed: int = 0
    progress: Callable[[str, float], None] = lambda description, fraction: None


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """A function from graph to graph. Subclasses are final, frozen dataclasses and implement `apply`."""

    needs: ClassVar[tuple[Predicate, ...]] = ()
    gives: ClassVar[tuple[Predicate, ...]] = ()
    keeps: ClassVar[Keeps] = REASSOCIATED

    @abc.abstractmethod
    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        """Returns the new graph and what was matched. Raises PassError where the pass cannot be applied."""

    @final
    def __call__(self, graph: Graph, context: Context = Context()) -> Graph:
        """Checks `needs`, applies the pass, checks `gives`, and appends its record to the graph's history."""
        self._check(self.needs, graph, "needs")
        start = time.perf_counter()
        result, record = self.apply(graph, context)
        self._check(self.gives, result, "promises")
        record = dataclasses.replace(
            record,
            seconds=time.perf_counter() - start,
            equations=(len(graph.jaxpr.eqns), len(result.jaxpr.eqns)),
        )
        return result.replace(history=(*graph.history, record))

    def _check(self, predicates: Iterable[Predicate], graph: Graph, verb: str) -> None:
        for predicate in predicates:
            missing = predicate(graph)
            if missing is not None:
                raise PassError(f"{type(self).__name__} {verb}: {missing}")


def is_forward(graph: Graph) -> str | None:
    """The graph is a forward over whole sequences."""
    return "a forward graph, but this one already is an incremental step" if graph.is_step else None


def is_step(graph: Graph) -> str | None:
    """The graph is an incremental step with a cache."""
    return None if graph.is_step else "an incremental step (run KVCache() first)"


def has_op(name: str) -> Predicate:
    """Returns the predicate that the graph has an operation of that name."""

    def predicate(graph: Graph) -> str | None:
        found = any(ir.is_op(eqn, name) for eqn in graph.jaxpr.eqns)
        return None if found else f"an operation xlathe.{name}, and the graph has none"

    return predicate
