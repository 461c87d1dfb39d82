"""Quantize a model from its first product to its last, so that each weight is calibrated on what it will get.

Held at once are the float weights of one section, one stage's sums of x^T x, and the activations at one cut point of
the residual stream. What is made is packed, and lies on disk where there is a folder to work in.
"""

import dataclasses
import functools
import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.graph import Graph
from xlathe.passes.observe import check_calibration
from xlathe.passes.quantize.method import Begun, Method, SectionMethod, WeightMethod
from xlathe.passes.quantize.recipe import Encode, check_calibrated
from xlathe.passes.quantize.section_task import SectionTask
from xlathe.passes.quantize.stages import Section, Stage, find_sections
from xlathe.passes.quantize.walk import Current, Walk, needed_inputs
from xlathe.passes.quantize.work import Made, Work, digest_of
from xlathe.pipeline import Context
from xlathe.stats import InputStats

LIBRARIES = ("xlathe", "jax", "jaxlib", "numpy", "scipy", "optax")
"""A run goes on with what another one finished where these are of the same versions."""


def quantize_in_order(
    graph: Graph, makers: Mapping[str, Encode], method: Method, context: Context
) -> tuple[dict[str, Encode], tuple[str, ...]]:
    """Returns the recipes with what they make, of every weight that is multiplied with activations, and remarks.

    Each gets statistics of its activations when all weights before it are quantized. A weight that several values are
    multiplied with gets the statistics of all of them, at the last one; what it makes of the others, or of look-ups (a
    tied embedding), is as it was before. Sections that are finished in `context.work` are taken from there.
    Raises OptionError without batches, PassError where activations are not finite.
    """
    run = _Run(graph, makers, method, check_calibration(graph, context.calibration), context)
    run.quantize()
    return run.makers, tuple(run.remarks())


class _Run:
    """One way through the model. makers: the recipes, with what they make as far as it went."""

    def __init__(
        self,
        graph: Graph,
        makers: Mapping[str, Encode],
        method: Method,
        batches: Sequence[dict[str, np.ndarray]],
        context: Context,
    ) -> None:
        self.graph, self.makers, self.method, self.context = graph, dict(makers), method, context
        self.sections = find_sections(graph, list(makers))
        self.work, self.digests, self.resumed = Work(context.work), list[str](), 0
        self.walk = Walk(graph, batches, Current(graph.weights))
        self.walks = [self.walk]
        if isinstance(method, SectionMethod):  # it is told what floats would make
            self.walks.append(Walk(graph, batches, Current(graph.weights), self.walk.compiled))
        self.left = Counter(name for section in self.sections for stage in section.stages for name in stage.names)
        self.uses = self.left.total()

    def quantize(self) -> None:
        """Quantizes section after section; those that are finished already are taken from the folder."""
        digest, begin, resuming = self._identity(), None, True
        for section in self.sections:
            inputs = needed_inputs(self.graph, begin, [section.output(self.graph)])
            self.walk.current.hold(inputs)
            before, digest, begin = digest, self._follow(digest, inputs), section.end
            made = self.work.load(digest) if resuming else None
            if made is not None:
                self._keep(made)
                self.left.subtract(name for stage in section.stages for name in stage.names)
                self.resumed += 1
                continue
            if resuming and self.resumed:
                self._go_on(section, before)
                self.walk.current.hold(inputs)
            resuming = False
            self._section(section)
            self._advance(section.end)
            made = {name: Made.of(self.makers[name]) for name in section.names}
            rows = [[np.asarray(value) for value in walk.values] for walk in self.walks]
            self._keep(self.work.save(digest, before, made, rows))

    def remarks(self) -> Iterator[str]:
        """Says what was taken from the folder, and what in it was not."""
        if self.resumed:
            yield f"went on after {self.resumed} of {len(self.sections)} sections that {self.work.folder} had"
        if others := self.work.others(self.digests):
            yield f"{self.work.folder} has {others} sections of another run as well, which are not used"

    def _identity(self) -> str:
        """Returns the digest of all that decides what is made, but for the weights."""
        if self.work.folder is None:
            return ""
        texts = [f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES]
        texts += [str(self.context.seed), self.graph.structural_hash]
        texts += [f"{make.name} {make.scheme} {make.method}" for make in self.makers.values()]
        rows = {f"{i}:{name}": array for i, row in enumerate(self.walk.rows) for name, array in row.items()}
        return digest_of("", texts, rows)

    def _follow(self, digest: str, inputs: Sequence[str]) -> str:
        """Returns the digest of a section: of all before it, and of its inputs that are as they were trained."""
        if self.work.folder is None:
            return ""
        current, given = self.walk.current, self.graph.names("arg")
        trained = [name for name in inputs if name not in given and name not in current.replaced]
        self.digests.append(digest_of(digest, [], {name: np.asarray(current[name]) for name in trained}))
        return self.digests[-1]

    def _go_on(self, section: Section, before: str) -> None:
        """Puts the rows where the last finished section ends: as they are in the folder, else through all of them."""
        found = self.work.load_rows(before)
        if found is None:
            for done in self.sections[: self.resumed]:
                self._advance(done.end)
                self.walk.current.hold(())
            return
        for walk, values in zip(self.walks, found, strict=True):
            walk.at, walk.values = section.start, [jnp.asarray(value) for value in values]

    def _advance(self, end: ir.Var | None) -> None:
        for walk in self.walks:
            if end is not None and end is not walk.at:
                walk.advance(end)
            if walk is not self.walk:
                walk.current.hold(())

    def _section(self, section: Section) -> None:
        """Quantizes the weights of a section."""
        self._advance(section.start)
        total: dict[str, InputStats] = {}
        begun: dict[str, Begun] = {}
        for stage in section.stages:
            self._stage(stage, total, begun)
        if begun and isinstance(self.method, SectionMethod):
            walk, floats = self.walks
            makers = {name: self.makers[name] for name in begun}
            task = SectionTask.of(section.output(self.graph), makers, begun, walk, floats, self.context.seed)
            for name, parts in self.method(task).items():
                self._keep({name: dataclasses.replace(Made.of(self.makers[name]), parts=parts)})

    def _stage(self, stage: Stage, total: dict[str, InputStats], begun: dict[str, Begun]) -> None:
        """Adds what the weights of a stage see, and rounds those that see no more."""
        seen = self.walk.observe(stage, gram=True)
        for first, names in stage.readers.items():
            stats = seen.pop(first)
            for name in names:
                total[name] = total[name] + stats if name in total else stats
                self.left[name] -= 1
                if not self.left[name]:
                    self._round(name, total.pop(name), begun)
        self.context.progress("quantizing", 1 - self.left.total() / self.uses)

    def _round(self, name: str, stats: InputStats, begun: dict[str, Begun]) -> None:
        """Rounds a weight; where a method goes on from there, `begun` gets what it needs."""
        check_calibrated(name, stats)
        make, weight = dataclasses.replace(self.makers[name], stats=stats), self.walk.current[name]
        if isinstance(self.method, WeightMethod):
            parts = make.make(weight)
        elif isinstance(self.method, SectionMethod) and stats.count:
            begun[name] = self.method.begin(name, make.matrix(weight), make.scheme.stored, stats)
            parts = begun[name].parts
        else:
            parts = make.scheme.stored.encode(make.matrix(weight))
        self._keep({name: Made(parts, dataclasses.replace(stats, gram=None))})

    def _keep(self, made: Mapping[str, Made]) -> None:
        """Lets weights be what they became."""
        for name, each in made.items():
            self.makers[name] = dataclasses.replace(self.makers[name], stats=each.stats, made=each.parts)
            aval = self.graph.aval(name)
            self.walk.current.replace(name, functools.partial(self.makers[name].value, aval.shape, aval.dtype))
