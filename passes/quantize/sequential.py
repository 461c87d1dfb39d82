"""Quantize a model from its first product to its last, so that each weight is calibrated on what it will get.

Held at once are the float weights of one section, one stage's sums of x^T x, and the activations at one cut point of
the residual stream. What is made is packed, and lies on disk where there is a folder to work in.

A *section* is a part of the model between two cut points (attention, or a feed-forward); a *stage* of it the products
that read one value (queries, keys and values), which are calibrated together; a `Walk` the activations of all
calibration rows at a cut point. Methods of whole sections have a second walk, the reference, through the weights as
they were trained.
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
from xlathe.passes.quantize.method import Initial, Method, SectionMethod, WeightMethod
from xlathe.passes.quantize.recipe import Encode, check_calibrated
from xlathe.passes.quantize.section_task import SectionTask
from xlathe.passes.quantize.stages import Section, Stage, find_sections
from xlathe.passes.quantize.walk import Current, Walk, needed_inputs
from xlathe.passes.quantize.work import QuantizedWeight, Work, digest_of
from xlathe.pipeline import Context
from xlathe.stats import InputStats

LIBRARIES = ("xlathe", "jax", "jaxlib", "numpy", "scipy", "optax")
"""A run goes on with what another one finished where these are of the same versions."""


def quantize_sequentially(
    graph: Graph, encoders: Mapping[str, Encode], method: Method, context: Context
) -> tuple[dict[str, Encode], tuple[str, ...]]:
    """Returns the recipes with what they make, of every weight that is multiplied with activations, and remarks.

    Each gets statistics of its activations when all weights before it are quantized. A weight that several values are
    multiplied with gets the statistics of all of them, at the last one; what it makes of the others, or of look-ups (a
    tied embedding), is as it was before. Sections that are finished in `context.work` are taken from there.
    Raises OptionError without batches, PassError where activations are not finite.
    """
    run = _SequentialRun(graph, encoders, method, check_calibration(graph, context.calibration), context)
    run.quantize()
    return run.encoders, tuple(run.notes())


class _SequentialRun:
    """One way through the model. encoders: the recipes, with what they make as far as it went."""

    def __init__(
        self,
        graph: Graph,
        encoders: Mapping[str, Encode],
        method: Method,
        batches: Sequence[dict[str, np.ndarray]],
        context: Context,
    ) -> None:
        self.graph, self.encoders, self.method, self.context = graph, dict(encoders), method, context
        self.sections = find_sections(graph, list(encoders))
        self.work, self.digests, self.resumed = Work(context.work), list[str](), 0
        self.walk = Walk(graph, batches, Current(graph.weights))
        self.walks = [self.walk]
        if isinstance(method, SectionMethod):  # it is told what floats would make
            self.walks.append(Walk(graph, batches, Current(graph.weights), self.walk.compiled))
        self.uses_left = Counter(name for section in self.sections for stage in section.stages for name in stage.names)
        self.uses_total = self.uses_left.total()

    def quantize(self) -> None:
        """Quantizes section after section; those that are finished already are taken from the folder."""
        digest, start, resuming = self._run_digest(), None, True
        for section in self.sections:
            inputs = needed_inputs(self.graph, start, [section.output(self.graph)])
            self.walk.current.hold(inputs)
            before, digest, start = digest, self._section_digest(digest, inputs), section.end
            made = self.work.load(digest) if resuming else None
            if made is not None:
                self._replace_weights(made)
                self.uses_left.subtract(name for stage in section.stages for name in stage.names)
                self.resumed += 1
                continue
            if resuming and self.resumed:
                self._restore_activations(section, before)
                self.walk.current.hold(inputs)
            resuming = False
            self._quantize_section(section)
            self._advance_activations(section.end)
            made = {name: QuantizedWeight.of(self.encoders[name]) for name in section.names}
            rows = [[np.asarray(value) for value in walk.values] for walk in self.walks]
            self._replace_weights(self.work.save(digest, before, made, rows))

    def notes(self) -> Iterator[str]:
        """Says what was taken from the folder, and what in it was not."""
        if self.resumed:
            yield f"went on after {self.resumed} of {len(self.sections)} sections that {self.work.folder} had"
        if others := self.work.others(self.digests):
            yield f"{self.work.folder} has {others} sections of another run as well, which are not used"

    def _run_digest(self) -> str:
        """Returns the digest of all that decides what is made, but for the weights."""
        if self.work.folder is None:
            return ""
        texts = [f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES]
        texts += [str(self.context.seed), self.graph.structural_hash]
        texts += [f"{encode.name} {encode.scheme} {encode.method}" for encode in self.encoders.values()]
        rows = {f"{i}:{name}": array for i, row in enumerate(self.walk.rows) for name, array in row.items()}
        return digest_of("", texts, rows)

    def _section_digest(self, digest: str, inputs: Sequence[str]) -> str:
        """Returns the digest of a section: of all before it, and of its inputs that are as they were trained."""
        if self.work.folder is None:
            return ""
        current, given = self.walk.current, self.graph.names("arg")
        trained = [name for name in inputs if name not in given and name not in current.replaced]
        self.digests.append(digest_of(digest, [], {name: np.asarray(current[name]) for name in trained}))
        return self.digests[-1]

    def _restore_activations(self, section: Section, before: str) -> None:
        """Puts the rows where the last finished section ends: as they are in the folder, else through all of them."""
        found = self.work.load_rows(before)
        if found is None:
            for done in self.sections[: self.resumed]:
                self._advance_activations(done.end)
                self.walk.current.hold(())
            return
        for walk, values in zip(self.walks, found, strict=True):
            walk.at, walk.values = section.start, [jnp.asarray(value) for value in values]

    def _advance_activations(self, end: ir.Var | None) -> None:
        for walk in self.walks:
            if end is not None and end is not walk.at:
                walk.advance(end)
            if walk is not self.walk:
                walk.current.hold(())

    def _quantize_section(self, section: Section) -> None:
        """Quantizes the weights of a section."""
        self._advance_activations(section.start)
        accumulated: dict[str, InputStats] = {}
        initial: dict[str, Initial] = {}
        for stage in section.stages:
            self._calibrate_stage(stage, accumulated, initial)
        if initial and isinstance(self.method, SectionMethod):
            walk, reference = self.walks
            encoders = {name: self.encoders[name] for name in initial}
            task = SectionTask.of(section.output(self.graph), encoders, initial, walk, reference, self.context.seed)
            for name, parts in self.method(task).items():
                self._replace_weights({name: dataclasses.replace(QuantizedWeight.of(self.encoders[name]), parts=parts)})

    def _calibrate_stage(self, stage: Stage, accumulated: dict[str, InputStats], initial: dict[str, Initial]) -> None:
        """Adds what the weights of a stage see, and rounds those that see no more."""
        seen = self.walk.observe(stage, gram=True)
        for first, names in stage.readers.items():
            stats = seen.pop(first)
            for name in names:
                accumulated[name] = accumulated[name] + stats if name in accumulated else stats
                self.uses_left[name] -= 1
                if not self.uses_left[name]:
                    self._quantize_weight(name, accumulated.pop(name), initial)
        self.context.progress("quantizing", 1 - self.uses_left.total() / self.uses_total)

    def _quantize_weight(self, name: str, stats: InputStats, initial: dict[str, Initial]) -> None:
        """Rounds a weight; where a method goes on from there, `initial` gets what it needs."""
        check_calibrated(name, stats)
        encode, weight = dataclasses.replace(self.encoders[name], stats=stats), self.walk.current[name]
        if isinstance(self.method, WeightMethod):
            parts = encode.make(weight)
        elif isinstance(self.method, SectionMethod) and stats.count:
            initial[name] = self.method.initialize(name, encode.matrix(weight), encode.scheme.stored, stats)
            parts = initial[name].parts
        else:
            parts = encode.scheme.stored.encode(encode.matrix(weight))
        self._replace_weights({name: QuantizedWeight(parts, dataclasses.replace(stats, gram=None))})

    def _replace_weights(self, made: Mapping[str, QuantizedWeight]) -> None:
        """Lets weights be what they became."""
        for name, each in made.items():
            self.encoders[name] = dataclasses.replace(self.encoders[name], stats=each.stats, made=each.parts)
            aval = self.graph.aval(name)
            self.walk.current.replace(name, functools.partial(self.encoders[name].value, aval.shape, aval.dtype))
