"""`xlathe distill`: a smaller graph learns what a larger one predicts."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xlathe.errors import OptionError
from xlathe.tools.command import Options, UsageError, Verb, output_file
from xlathe.tools.console import bar, make_console
from xlathe.tools.opt import UNFINISHED
from xlathe.tools.source import DEMO, DEMO_LENGTH, open_graph, parse_passes

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from xlathe.graph import Graph
    from xlathe.passes.distill.objective import Objective
    from xlathe.passes.distill.rows import Rows
    from xlathe.passes.distill.step import Lesson, Settings
    from xlathe.passes.distill.train import Moment

LINES = 20  # of progress where there is no terminal


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("teacher", None, "the demo, a checkpoint or a graph directory", flag_values=values)
    flags.DEFINE_string("text", None, "file of the text, in UTF-8; the demo has its own", flag_values=values)
    flags.DEFINE_integer("tokens", None, "of the text to train on, again and again if need be", flag_values=values)
    define_training(values)
    flags.DEFINE_float("on_policy", 0.0, "fraction of steps on text that the student writes", flag_values=values)
    flags.DEFINE_boolean("shared_vocab", False, "compare the logits that both models have", flag_values=values)
    flags.DEFINE_string("plan", None, "pruning plan that made the student, for features", flag_values=values)
    flags.DEFINE_string(
        "teacher_logits", None, "folder for the teacher's likeliest tokens, which top_k reads", flag_values=values
    )
    flags.DEFINE_string("workdir", None, f"folder for checkpoints; OUT{UNFINISHED} by default", flag_values=values)
    flags.DEFINE_string("json", None, "file for the loss of each step", flag_values=values)
    flags.DEFINE_string("html", None, "file for a page with the curve of the loss", flag_values=values)


def define_training(values: flags.FlagValues) -> None:
    """Adds the flags that say what is learned, and how fast."""
    flags.DEFINE_string("loss", "forward_kl", "terms that are added up; see passes/distill", flag_values=values)
    flags.DEFINE_integer("rows", 4, "texts that are computed at once", flag_values=values)
    flags.DEFINE_integer("accumulate", 1, "so many times these make a step", flag_values=values)
    flags.DEFINE_integer("context", DEMO_LENGTH, "tokens of a text, at most the model's", flag_values=values)
    flags.DEFINE_float("learning_rate", 4e-3, "the highest learning rate", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the order of texts", flag_values=values)


def run(options: Options, source: str, destination: str) -> None:
    from xlathe.passes.distill.objective import Objective
    from xlathe.passes.distill.step import Settings
    from xlathe.passes.distill.train import distill

    objective = Objective.parse(options["loss"])
    if options["tokens"] is None:
        raise UsageError("for how long? --tokens=N")
    if options["teacher"] is None and objective.needs_teacher:
        raise UsageError(f"which teacher? --teacher=MODEL; {objective} asks for one")
    names = ("tokens", "rows", "accumulate", "learning_rate", "seed", "on_policy")
    settings, console = Settings(**{name: options[name] for name in names}), make_console()
    files = {name: output_file(options, name) for name in ("json", "html")}
    student = fused(open_graph(source, changing=True))
    asked = options["teacher"] and objective.needs_teacher
    teacher = fused(open_graph(options["teacher"])) if asked else None
    mine = DEMO in (source, options["teacher"])
    context = options["context"] if teacher is None else min(options["context"], teacher.max_len)
    rows = find_rows(student, source, options["text"], context, settings, demo=mine)
    workdir = Path(options["workdir"] or destination + UNFINISHED)
    with bar(console, "distill") as progress:
        lesson = _lesson(options, objective, student, teacher, rows, progress)
        report = teller(console, progress)
        result, losses = distill(student, rows, lesson, settings, workdir=workdir, report=report)
    result.save(destination)
    if options["workdir"] is None:
        shutil.rmtree(workdir, ignore_errors=True)
    console.print(result.report(), soft_wrap=True)
    _write(files, f"{source}, {objective}", settings, rows, losses)


def fused(graph: "Graph") -> "Graph":
    """Returns a graph whose attention is found, by which its layers are told."""
    return parse_passes("canonicalize,fuse_attention")(graph)


def find_rows(
    student: "Graph", source: str, text: str | None, context: int, settings: "Settings", *, demo: bool
) -> "Rows":
    """Returns the text of a file, or the demo's own, as rows; OptionError where it is less than one step takes."""
    import numpy as np

    from xlathe.passes.distill.rows import Rows
    from xlathe.tools.text import encode, read_text, training_tokens

    if text is not None:
        ids = encode(read_text(Path(text), "text"), student.tokenizer, source, "training on a text")
        tokens = np.asarray(ids, np.int32)
    elif demo:
        tokens = training_tokens()
    else:
        raise UsageError("which text? --text=FILE")
    length = min(context, student.max_len)
    step = settings.rows * settings.accumulate * length
    if tokens.size <= step:
        raise OptionError(
            f"--text: expected more than the {step:,} tokens of one step ({settings.rows} rows x {settings.accumulate} "
            f"x {length}), found {tokens.size:,}; give more text, or fewer rows a step or tokens a row"
        )
    return Rows.cut(tokens, length)


def _lesson(
    options: Options,
    objective: "Objective",
    student: "Graph",
    teacher: "Graph | None",
    rows: "Rows",
    progress: Callable[[str, float], None],
) -> "Lesson":
    from xlathe.passes.distill.features import NO_PAIRS, Kept, count_layers, pair_features
    from xlathe.passes.distill.objective import TopK
    from xlathe.passes.distill.step import Lesson
    from xlathe.passes.distill.stored import store_teacher
    from xlathe.passes.distill.vocabularies import check_vocabularies
    from xlathe.passes.prune.plan import PrunePlan

    if teacher is None or not objective.needs_teacher:
        return Lesson(objective)
    if options["shared_vocab"] and options["teacher_logits"] is not None:
        raise UsageError("--shared_vocab: stored logits are of all that the teacher knows; leave out --teacher_logits")
    check_vocabularies(student, teacher, options["shared_vocab"])
    kept = Kept().then(PrunePlan.load(options["plan"]), count_layers(teacher)) if options["plan"] else Kept()
    pairs = pair_features(student, teacher, kept) if objective.needs_features else NO_PAIRS
    if options["teacher_logits"] is None:
        return Lesson(objective, teacher, pairs)
    top = objective.terms[0]
    if len(objective.terms) != 1 or not isinstance(top, TopK):
        raise UsageError(f"--teacher_logits holds what top_k reads; found --loss={objective}")
    stored = store_teacher(teacher, rows, top.k, top.temperature, Path(options["teacher_logits"]), progress)
    return Lesson(objective, stored=stored)


def teller(console: "Console", progress: Callable[[str, float], None]) -> "Callable[[Moment], None]":
    """Returns what shows a moment: in the bar of a terminal, elsewhere as a line from time to time."""

    def tell(moment: "Moment") -> None:
        left = time.strftime("%H:%M:%S", time.gmtime(moment.seconds_left))
        speed = f"{moment.tokens_per_second:,.0f} tokens/s"
        text = f"step {moment.step:,} of {moment.steps:,}  loss {moment.loss:.4f}  {speed}  {left} left"
        progress(text, moment.step / moment.steps)
        if not console.is_terminal and moment.step % max(1, moment.steps // LINES) == 0:
            console.print(text, soft_wrap=True)

    return tell


def _write(
    files: "dict[str, Path | None]", title: str, settings: "Settings", rows: "Rows", losses: "np.ndarray"
) -> None:
    from xlathe.tools.page import document, figure
    from xlathe.tools.plots import curves

    step = settings.rows * settings.accumulate * rows.length
    if (path := files["json"]) is not None:
        told = {"title": title, "tokens_per_step": step, "losses": losses.tolist()}
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if (path := files["html"]) is not None:
        drawn = curves("loss", title, "tokens", "loss, nats a token", [("loss", step, losses.tolist())])
        path.write_text(document("xlathe distill", [figure(drawn, title)]), encoding="utf-8")


VERB = Verb(
    "distill",
    "train a smaller graph on what a larger one predicts, and save it",
    ("STUDENT", "OUT"),
    define,
    run,
)
