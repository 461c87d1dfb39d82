"""Distillation beside its alternatives, on the demo's target: pruning alone, and training the same shape from nothing.

`python -m xlathe.tools.distill_table WORKDIR [TOKENS [PARAMS ...]]`: prunes to each fraction of the parameters by the
search of `xlathe prune`, trains what is left in each of the ways of `WAYS` on TOKENS of the training side of this
Python's library, and measures all on held-out text, which nothing else was chosen by.
Writes table.md, curves.json and page.html to WORKDIR after each, and the weights of row N to N.safetensors; what is
there is not trained again.
"""

import dataclasses
import json
import sys
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np

from xlathe.graph import Graph
from xlathe.models.demo import files as demo_files
from xlathe.passes.distill.features import NO_PAIRS, Kept, count_layers, pair_features
from xlathe.passes.distill.objective import Objective
from xlathe.passes.distill.rows import Rows
from xlathe.passes.distill.step import Lesson, Settings
from xlathe.passes.distill.train import Moment, distill
from xlathe.passes.prune import PruneStructured, prune
from xlathe.pipeline import Context
from xlathe.report import count_parameters
from xlathe.tools.console import bar, make_console
from xlathe.tools.measure import qualities
from xlathe.tools.page import document, section
from xlathe.tools.quality import Quality
from xlathe.tools.results import Sheet, estimate_text
from xlathe.tools.source import DEMO, DEMO_LENGTH, open_graph, parse_passes
from xlathe.tools.stages import machine
from xlathe.tools.text import held_out_windows, training_rows, training_tokens

TOKENS: Final = 3 << 15
HELD_OUT: Final = 1 << 14
PARAMS: Final = ("0.5", "0.3", "0.1")
HEADINGS: Final = ("parameters", "perplexity", "KL from\nthe target", "same\ntop-1 %")


@dataclasses.dataclass(frozen=True)
class Way:
    """How weights of a pruned shape are found; objective None trains nothing, fresh begins with drawn weights."""

    name: str
    objective: str | None
    learning_rate: float = 4e-3
    fresh: bool = False

    @property
    def has_features(self) -> bool:
        return self.objective is not None and Objective.parse(self.objective).needs_features


# 4e-3 was the best of 2e-3, 4e-3 and 8e-3 for another shape; 5e-3 is what the target was trained with.
WAYS: Final = (
    Way("pruned alone", None),
    Way("the shape from nothing", "cross_entropy", 5e-3, fresh=True),
    Way("pruned, then logits", "forward_kl"),
    Way("pruned, then logits and features", "forward_kl,features"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to a pruned shape: its quality beside the target's, and the loss of each step."""

    shape: str
    name: str
    parameters: int
    quality: Quality
    losses: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        found = self.quality
        return (
            self.name,
            f"{self.parameters:,}",
            estimate_text(found.perplexity),
            estimate_text(found.kl),
            estimate_text(found.same_top1, 100),
        )


def main(words: list[str]) -> None:
    console, workdir = make_console(), Path(words[0])
    tokens, budgets = int(words[1]) if len(words) > 1 else TOKENS, words[2:] or PARAMS
    workdir.mkdir(parents=True, exist_ok=True)
    teacher = parse_passes("canonicalize,fuse_attention")(open_graph(DEMO))
    calibration = list(training_rows().tokens[:, None])
    rows = Rows.cut(training_tokens(), DEMO_LENGTH)
    windows, found = held_out_windows(HELD_OUT), list[Row]()
    for budget in budgets:
        chosen = PruneStructured(params=float(budget), score="activation")
        with bar(console, f"params={budget}") as progress:
            plan = chosen.make_plan(teacher, Context(calibration, progress=progress))
        console.print(f"without {plan.removed}", soft_wrap=True)
        plan.save(workdir / f"plan-{budget}.json")
        pruned, kept = prune(teacher, plan), Kept().then(plan, count_layers(teacher))
        comparable = count_layers(pruned) > 0  # a single layer is told from nothing else
        for way in (way for way in WAYS if comparable or not way.has_features):
            with bar(console, way.name) as progress:
                graph, losses = _train(way, pruned, teacher, kept, rows, tokens, workdir, progress)
                quality = qualities(teacher, [graph], windows, progress)[0]
            weights = {name: graph.arrays[name] for name in graph.names("weight")}
            demo_files.save(weights, workdir / f"{len(found)}.safetensors")
            shape = f"--params={budget}: without {plan.removed}"
            found.append(Row(shape, way.name, count_parameters(graph), quality, tuple(losses.tolist())))
            console.print(" | ".join(found[-1].cells()), soft_wrap=True)
            _write(workdir, found, tokens)


def _train(
    way: Way, pruned: Graph, teacher: Graph, kept: Kept, rows: Rows, tokens: int, workdir: Path, progress: Any
) -> tuple[Graph, np.ndarray]:
    """Returns the graph, and the loss of each step."""
    if way.objective is None:
        return pruned, np.zeros(0, np.float32)
    objective = Objective.parse(way.objective)
    pairs = pair_features(pruned, teacher, kept) if way.has_features else NO_PAIRS
    lesson = Lesson(objective, teacher if objective.needs_teacher else None, pairs)

    def report(moment: Moment) -> None:
        text = f"{way.name}: loss {moment.loss:.3f}, {moment.tokens_per_second:,.0f} tokens/s"
        progress(text, moment.step / moment.steps)

    settings = Settings(tokens, learning_rate=way.learning_rate)
    return distill(fresh(pruned) if way.fresh else pruned, rows, lesson, settings, workdir=workdir, report=report)


def fresh(graph: Graph) -> Graph:
    """Returns a graph of the demo's family with drawn weights, as `xlathe.models.demo.train` begins.

    What a layer adds to the residual stream starts at zero, and scales at one.
    """
    draw, weights = np.random.default_rng(0), dict[str, np.ndarray]()
    for name in graph.names("weight"):
        shape = graph.aval(name).shape
        summed = shape[-1] if name.startswith("embedding") else shape[0]
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        elif "/output/" in name or "/down/" in name:
            weights[name] = np.zeros(shape, np.float32)
        else:
            weights[name] = (draw.normal(size=shape) / np.sqrt(summed)).astype(np.float32)
    return graph.with_weights(weights)


def _write(workdir: Path, found: list[Row], tokens: int) -> None:
    sheets = [
        Sheet(
            shape,
            f"{tokens:,} training tokens each; {HELD_OUT:,} held-out tokens, ± standard error over windows of "
            f"{DEMO_LENGTH}; KL divergence in nats a token; {machine()}",
            HEADINGS,
            tuple(row.cells() for row in found if row.shape == shape),
        )
        for shape in dict.fromkeys(row.shape for row in found)
    ]
    rows = [dataclasses.asdict(row) for row in found]
    (workdir / "curves.json").write_text(json.dumps({"tokens": tokens, "rows": rows}, indent=1) + "\n")
    (workdir / "table.md").write_text("\n\n".join(map(_markdown, sheets)) + "\n")
    page = document(
        "Distillation", ["<h1>Distillation</h1>", *(section(sheet, escape(sheet.title)) for sheet in sheets)]
    )
    (workdir / "page.html").write_text(page, encoding="utf-8")


def _markdown(sheet: Sheet) -> str:
    headings = " | ".join(heading.replace("\n", " ") for heading in sheet.headings)
    lines = [f"`{sheet.title}`: {sheet.caption}", "", f"| | {headings} |", "|---" * (len(sheet.headings) + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sheet.rows)])


if __name__ == "__main__":
    main(sys.argv[1:])
