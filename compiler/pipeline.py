"""The contract of a pass, and pipelines of them.

A pass is a frozen dataclass whose fields are its options. It maps a graph to a graph and says what it
relies on:

* `needs` and `gives`: predicates on graphs, checked before and after on every run;
* `keeps`: how equal the result is to the input, checked on sampled tokens under `verify=`.
"""

import abc
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import jax
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError, XlatheError, did_you_mean
from xlathe.graph import Graph, Record, check_graph
from xlathe.instruments import Dump, Instrument, PrintAfterChange
from xlathe.pass_text import parse_passes, pass_name, print_pass
from xlathe.verify import check_equal, check_structure

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
    description and the fraction done; limit: the most rewrites that a pass may make, for bisection; work: a folder
    where a pass that takes long keeps what it has finished, and finds it when it is run again; planned: called by a
    pass that has a plan (`str` is its text, `to_json` its JSON) with it and the graph, before anything of it is done.
    """

    calibration: Sequence[Any] = ()
    seed: int = 0
    progress: Callable[[str, float], None] = lambda description, fraction: None
    limit: int | None = None
    work: Path | None = None
    planned: Callable[[Any, Graph], None] = lambda plan, graph: None


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
        check_graph(graph, str(self))
        self._check(self.needs, graph, "needs")
        start = time.perf_counter()
        result, record = self.apply(graph, context)
        self._check(self.gives, result, "promises")
        record = dataclasses.replace(
            record,
            name=str(self),
            seconds=time.perf_counter() - start,
            equations=(len(graph.jaxpr.eqns), len(result.jaxpr.eqns)),
        )
        return result.replace(history=(*graph.history, record))

    @final
    def __str__(self) -> str:
        """The text form, `quantize{scheme=int8}`; `Pipeline.parse` reads it back."""
        return print_pass(self)

    def _check(self, predicates: Iterable[Predicate], graph: Graph, verb: str) -> None:
        for predicate in predicates:
            missing = predicate(graph)
            if missing is not None:
                raise PassError(f"{type(self).__name__} {verb}: {missing}")


def count_rewrites(record: Record) -> int:
    """Returns how many rewrites a pass made; one that does not tell them apart made one."""
    return len(record.rewrites) or 1


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


@final
@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order, and what is checked after each.

    passes: passes or pipelines of them, which are spliced in with what they expect.
    verify: int32 tokens [b, t] on which each pass must keep what it says it keeps; True draws some; None
        checks structure only.
    expect: the least number of hits of a rule over all passes, `{"attention": 12}`: a model must not lose
        an optimization in silence.
    """

    passes: Sequence["Pass | Pipeline"]
    verify: Any = None
    expect: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        given = tuple(self.passes) if isinstance(self.passes, Iterable) else None
        if given is None or not all(isinstance(each, Pass | Pipeline) for each in given):
            raise OptionError(
                f"a pipeline is a list of passes (Canonicalize(), not its class or its name), got {self.passes!r}"
            )
        flat: list[Pass] = []
        expect: dict[str, int] = {}
        for each in given:
            flat.extend(each.passes if isinstance(each, Pipeline) else [each])  # type: ignore[arg-type]
            expect |= each.expect if isinstance(each, Pipeline) else {}
        object.__setattr__(self, "passes", tuple(flat))
        object.__setattr__(self, "expect", expect | dict(self.expect))

    def __str__(self) -> str:
        """The text form of the passes, `canonicalize,fuse_attention,quantize{scheme=int8}`."""
        return ",".join(map(str, self.passes))

    @staticmethod
    def parse(text: str, table: Mapping[str, type[Pass]], **options: Any) -> "Pipeline":
        """Reads the text form.

        table: pass classes by name (`xlathe.passes.PASSES`).
        Raises OptionError for unknown passes and options and for values of a wrong type.
        """
        return Pipeline(parse_passes(text, table), **options)

    def __call__(
        self,
        graph: Graph,
        *,
        calibration: Sequence[Any] = (),
        seed: int = 0,
        progress: Callable[[str, float], None] = lambda description, fraction: None,
        dump: str | os.PathLike[str] | None = None,
        print_after_change: bool = False,
        limit: int | None = None,
        work: str | os.PathLike[str] | None = None,
        planned: Callable[[Any, Graph], None] = lambda plan, graph: None,
    ) -> Graph:
        """Runs the passes; the result's history tells what each did.

        calibration, seed, progress, planned: see `Context`. dump: a directory for the graph after every pass, and for
        a reproducer where one fails. limit: stops after so many rewrites, as `bisect` does; a pass that does not
        tell its rewrites apart is one. Nothing is expected then. work: a folder, made if need be, where passes that
        take long keep what they have finished: a run with the same model, passes and calibration goes on from there.
        Raises what the failing pass raises, with the pass and its place; PassError where a result is
        malformed, differs more than promised, or an expected rule found too little; OptionError where calibration is
        no sequence, also where no pass reads it.
        """
        check_graph(graph, "a pipeline")
        if isinstance(calibration, str | bytes) or not isinstance(calibration, Sequence | np.ndarray | jax.Array):
            found = type(calibration).__name__
            raise OptionError(f"calibration must be a list of batches, int32 tokens [b, t], got {found}")
        context = Context(calibration, seed, progress, limit, None if work is None else Path(work), planned)
        watching: list[Instrument] = [Dump(Path(dump))] if dump is not None else []
        watching += [PrintAfterChange()] if print_after_change else []
        check_structure(graph)
        before = len(graph.history)
        for instrument in watching:
            instrument.started(graph)
        for number, pass_ in enumerate(self.passes, 1):
            if context.limit == 0:
                break
            progress(str(pass_), (number - 1) / len(self.passes))
            graph = self._run(number, pass_, graph, context, watching)  # type: ignore[arg-type]
            if context.limit is not None:
                left = context.limit - count_rewrites(graph.history[-1])
                context = dataclasses.replace(context, limit=max(left, 0))
        progress("done", 1.0)
        if limit is None:
            self._check_expected(graph.history[before:])
        return graph

    def _run(
        self, number: int, pass_: Pass, graph: Graph, context: Context, watching: Sequence[Instrument]
    ) -> Graph:
        name = pass_name(type(pass_))
        try:
            result = pass_(graph, context)
            check_structure(result, graph)
            self._check_kept(pass_, graph, result, context.seed)
        except Exception as error:
            remarks = [r for r in (i.failed(name, str(pass_), graph) for i in watching) if r]
            kind = type(error) if isinstance(error, XlatheError) else PassError
            reason = str(error) if isinstance(error, XlatheError) else f"{type(error).__name__}: {error}"
            place = f"pass {number} of {len(self.passes)}, {pass_}"
            raise kind("; ".join([f"{place}: {reason}", *remarks])) from error
        for instrument in watching:
            instrument.finished(number, name, graph, result)
        return result

    def _check_kept(self, pass_: Pass, before: Graph, after: Graph, seed: int) -> None:
        if self.verify is None or self.verify is False or pass_.keeps.rtol is None:
            return
        if not after.has_free_length:  # a graph with fixed sizes takes no other tokens
            return
        shape = (2, min(16, before.max_len))
        drawn = np.random.default_rng(seed).integers(0, before.vocab, shape, dtype=np.int32)
        check_equal(before, after, drawn if self.verify is True else self.verify, pass_.keeps.rtol)

    def _check_expected(self, records: Sequence[Record]) -> None:
        hits: Counter[str] = Counter()
        for record in records:
            hits.update(record.hits)
        for rule, least in self.expect.items():
            if rule not in hits:
                raise PassError(
                    f"expected {least} hits of {rule!r}; no pass counts it{did_you_mean(rule, hits)}"
                )
            if hits[rule] < least:
                misses = [m for r in records if rule in r.hits for m in r.misses] or ["no near miss"]
                listed = "".join(f"\n  {miss}" for miss in misses)
                raise PassError(f"expected {least} hits of {rule!r}, found {hits[rule]}; nearly:{listed}")
