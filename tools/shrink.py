"""`xlathe shrink`: prunes a model and heals it, round after round, quantizes what is left and compiles it.

Each stage leaves its result in a folder of `OUT.stages`, named after its number and a digest of all that it was made
of: what is there is not made again, and nothing that other options made is taken.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from absl import flags

from xlathe.errors import OptionError
from xlathe.files import replaced
from xlathe.tools.command import Options, UsageError, Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.distill import find_rows, fused, teller
from xlathe.tools.shrink_recipe import Recipe, find_recipe
from xlathe.tools.source import DEMO, is_bundle, open_graph, parse_passes

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from xlathe.graph import Graph
    from xlathe.passes.distill.features import Kept
    from xlathe.passes.distill.objective import Objective
    from xlathe.passes.distill.rows import Rows
    from xlathe.passes.distill.step import Settings

STAGES: Final = ".stages"
LARGEST_STEP: Final = 1 / 3  # of the parameters, removed in one round: more is hard to heal
CALIBRATION_ROWS: Final = 8
EVAL_TOKENS: Final = 8192  # of the demo's held-out text


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "a recipe by name, half, or a JSON file of one", flag_values=values)
    flags.DEFINE_string("text", None, "file of the text to train on; the demo has its own", flag_values=values)
    flags.DEFINE_string("eval_text", None, "file of the text to judge by; the demo has its own", flag_values=values)
    flags.DEFINE_string("workdir", None, f"folder for the stages; OUT{STAGES} by default", flag_values=values)


def run(options: Options, source: str, destination: str) -> None:
    from xlathe.passes.distill.objective import Objective
    from xlathe.passes.distill.step import Settings

    if options["config"] is None:
        raise UsageError("which recipe? --config=half, or a JSON file")
    recipe, console = find_recipe(options["config"]), make_console()
    settings = Settings(recipe.tokens, recipe.rows, learning_rate=recipe.learning_rate)
    objective = Objective.parse(recipe.loss)
    with bar(console, "load"):
        whole = fused(open_graph(source, changing=True))
        demo = source == DEMO
        rows = find_rows(whole, source, options["text"], recipe.context, settings, demo=demo)
        windows = _windows(options["eval_text"], source, whole, demo=demo)
    workdir = Path(options["workdir"] or destination + STAGES)
    workdir.mkdir(parents=True, exist_ok=True)
    shrinking = Shrinking(recipe, whole, rows, windows, objective, settings, workdir, console)
    shrinking.write(shrinking.rounds(), Path(destination))
    console.print(f"{destination}: a bundle; {workdir} has the stages, and may be removed", soft_wrap=True)


@final
@dataclasses.dataclass(frozen=True)
class Shrinking:
    """A model on its way. whole: what students learn from; windows: what they are judged by, int32 [n, length]."""

    recipe: Recipe
    whole: "Graph"
    rows: "Rows"
    windows: "np.ndarray"
    objective: "Objective"
    settings: "Settings"
    workdir: Path
    console: "Console"

    def rounds(self) -> "tuple[Graph, str]":
        """Returns the student after all rounds, and the digest of all that made it."""
        from xlathe.passes.distill.features import Kept, count_layers
        from xlathe.passes.prune.plan import PrunePlan

        graph, kept, digest = self.whole, Kept(), self._begin()
        for number, text in enumerate(self.recipe.rounds):
            digest = _follow(digest, "prune", text)
            plan_file = self.workdir / f"{number + 1}-pruned-{digest}.json"
            graph = self._stage(plan_file.with_suffix(""), self._pruned(number, graph, plan_file))
            kept = kept.then(PrunePlan.load(plan_file), count_layers(self.whole))
            self._judge(f"{number + 1}: pruned", graph, plan_file.with_suffix(""))
            digest = _follow(digest, "distill", str(self.objective), str(self.settings))
            folder = self.workdir / f"{number + 1}-healed-{digest}"
            graph = self._stage(folder, self._healed(graph, kept))
            self._judge(f"{number + 1}: healed", graph, folder)
        return graph, digest

    def write(self, made: "tuple[Graph, str]", destination: Path) -> None:
        """Quantizes a student, and writes its program as a bundle."""
        from xlathe.program import compile

        graph, before = made
        digest = _follow(before, "quantize", self.recipe.quantize)
        folder = self.workdir / f"quantized-{digest}"
        passes = parse_passes(self.recipe.quantize)
        quantized = self._stage(folder, lambda: passes(graph, calibration=self._calibration))
        self._judge("quantized", quantized, folder)
        written = folder.with_suffix(".written")  # says which bundle is of this student
        if not (written.exists() and written.read_text() == _bundle_text(destination)):
            with bar(self.console, "compile"):
                compile(quantized).save(destination)
            written.write_text(_bundle_text(destination))

    def _begin(self) -> str:
        import numpy as np

        from xlathe.passes.quantize.work import digest_of

        arrays = {name: np.asarray(array) for name, array in self.whole.arrays.items()}
        texts = {"tokens": self.rows.tokens, "mask": self.rows.mask}
        return digest_of("", [self.whole.structural_hash], {**arrays, **texts})

    @property
    def _calibration(self) -> "list[np.ndarray]":
        whole = self.rows.tokens[self.rows.mask.all(1)]  # padding is no text
        return list(whole[:CALIBRATION_ROWS, None, :-1])

    def _stage(self, folder: Path, make: "Callable[[], Graph]") -> "Graph":
        """Returns the graph of a stage, made where it is not there."""
        from xlathe.graph_file import PROGRAM, load_graph

        if not (folder / PROGRAM).exists():
            make().save(folder)
        return load_graph(folder)  # also what was just made, so that a run that goes on sees the same

    def _pruned(self, number: int, graph: "Graph", plan_file: Path) -> "Callable[[], Graph]":
        from xlathe.passes.prune import PruneStructured
        from xlathe.pipeline import Context

        def make() -> "Graph":
            plan = self.recipe.prune(number).make_plan(graph, Context(calibration=self._calibration))
            share = 1 - plan.after.parameters / plan.before.parameters
            if share > LARGEST_STEP:
                raise OptionError(
                    f"round {number + 1} removes {share:.0%} of {plan.before.parameters:,} parameters, expected at "
                    "most a third, which training heals; spread it over more rounds"
                )
            plan.save(plan_file)
            return PruneStructured(plan=str(plan_file))(graph)

        return make

    def _healed(self, graph: "Graph", kept: "Kept") -> "Callable[[], Graph]":
        from xlathe.passes.distill.features import NO_PAIRS, pair_features
        from xlathe.passes.distill.step import Lesson
        from xlathe.passes.distill.train import distill

        def make() -> "Graph":
            pairs = pair_features(graph, self.whole, kept) if self.objective.needs_features else NO_PAIRS
            lesson = Lesson(self.objective, self.whole, pairs)
            with bar(self.console, "distill") as progress:
                report = teller(self.console, progress)
                return distill(graph, self.rows, lesson, self.settings, workdir=self.workdir, report=report)[0]

        return make

    def _judge(self, name: str, graph: "Graph", folder: Path) -> None:
        """Prints how far the graph of a stage is from the whole model, measured where no file says so."""
        from xlathe.passes.quantize.work import digest_of
        from xlathe.report import count_parameters, weight_bytes

        judged_by = digest_of("", [], {"windows": self.windows})
        file = folder.with_name(f"{folder.name}-{judged_by}.quality")
        if not file.exists():
            with replaced(file) as written:
                written.write((json.dumps(self._quality(graph), indent=1) + "\n").encode())
        told: dict[str, dict[str, float]] = json.loads(file.read_text())
        figures = "  ".join(f"{key} {each['mean']:.4g} ± {each['error']:.2g}" for key, each in told.items())
        size = f"{count_parameters(graph):,} parameters  {weight_bytes(graph) / 1e6:.2f} MB"
        self.console.print(f"{name}: {size}  {figures}", soft_wrap=True)

    def _quality(self, graph: "Graph") -> dict[str, Any]:
        from xlathe.tools.measure import qualities

        with bar(self.console, "evaluate") as progress:
            (found,) = qualities(self.whole, [graph], self.windows, progress)
        return {"perplexity": dataclasses.asdict(found.perplexity), "KL": dataclasses.asdict(found.kl)}


def _bundle_text(destination: Path) -> str:
    """Returns where a bundle lies and what tells it from others; nothing where there is none."""
    from xlathe.manifest import MANIFEST

    if not is_bundle(str(destination)):
        return ""
    return f"{destination.absolute()}\n{(destination / MANIFEST).read_text()}"


def _follow(digest: str, *texts: str) -> str:
    from xlathe.passes.quantize.work import digest_of

    return digest_of(digest, texts, {})


def _windows(text: str | None, source: str, graph: "Graph", *, demo: bool) -> "np.ndarray":
    from xlathe.tools.protocol import WINDOWS, beginning, cut
    from xlathe.tools.text import encode, held_out_windows, read_text

    if text is None:
        if not demo:
            raise UsageError("which text to judge by? --eval_text=FILE")
        return held_out_windows(EVAL_TOKENS)
    tokens = encode(read_text(Path(text), "eval_text"), graph.tokenizer, source, "evaluating a text")
    return cut(WINDOWS, tokens, beginning(graph.tokenizer), graph.max_len, None)


VERB = Verb(
    "shrink",
    "prune a model and heal it, in rounds, quantize what is left and compile it",
    ("MODEL", "OUT"),
    define,
    run,
)
