"""The stages of `xlathe demo`: each does its work, and tells in a line or two what came out."""

import dataclasses
import datetime
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from xlathe.aot import to_step
from xlathe.graph import Graph, Record
from xlathe.kernels import native
from xlathe.manifest import WEIGHTS
from xlathe.pipeline import Pipeline
from xlathe.program import Program, compile
from xlathe.report import count_parameters, weight_bytes
from xlathe.step import state_bytes
from xlathe.tools.console import bar
from xlathe.tools.measure import Speed, qualities, speeds
from xlathe.tools.quality import Quality
from xlathe.tools.results import Conditions, Report, Result
from xlathe.tools.served import Served
from xlathe.tools.speculation import Drafted, in_turns, judge
from xlathe.tools.text import TrainingRows

ROUNDS = 5  # of measuring speed: half a window as the prompt, a quarter of its length as the answer
REMOVED = "removed "  # how the note of a pruning pass begins


@dataclasses.dataclass(frozen=True)
class Drafting:
    """A drafter, `n-gram` or `model`, that proposes gamma tokens to a pipeline's program."""

    pipeline: str
    drafter: str
    gamma: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What the demo does with every pipeline.

    graph, draft: as traced; windows: held-out int32 [n, length], 2 <= n, 4 <= length <= the graphs' max_len;
    calibration: what passes may look at; prompt: completed by up to max_tokens tokens. others: what a pipeline begins
    with instead of graph, by its name.
    """

    graph: Graph
    draft: Graph
    windows: np.ndarray
    calibration: TrainingRows
    prompt: str
    max_tokens: int
    others: Mapping[str, Graph] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Built:
    """A pipeline's way through all stages before anything is measured."""

    name: str
    pipeline: Pipeline
    step: Graph
    program: Program
    disk_bytes: int
    completion: str


def run_stages(
    task: Task, pipelines: Sequence[tuple[str, Pipeline]], draftings: Sequence[Drafting], console: Console
) -> Report:
    """Takes a graph through every pipeline, measures all in turns, and lets some be drafted for.

    The result of the first pipeline is what the quality of all is compared with.
    """
    built = [_build(task, name, pipeline, console) for name, pipeline in pipelines]
    windows, length = task.windows.shape
    prompt, new_tokens = task.windows[0, : length // 2].tolist(), length // 4
    with bar(console, "measure quality") as progress:
        served = [Served(each.step) for each in built]
        judged = qualities(served[0], served, task.windows, progress)
    with bar(console, "measure speed") as progress:
        programs = [(each.program, weight_bytes(each.step)) for each in built]
        timed = speeds(programs, prompt, new_tokens, ROUNDS, progress)
    results = [_result(task, *found) for found in zip(built, judged, timed, strict=True)]
    today, names = datetime.date.today().isoformat(), task.calibration.names
    return Report(
        Conditions(today, machine(), task.prompt, names, windows, length, ROUNDS, len(prompt), new_tokens),
        tuple(results),
        tuple(_speculate(task, built, draftings, console)),
    )


def machine() -> str:
    """Returns what the figures depend on: processor, instruction set of the kernels, version of JAX."""
    usable = native.unusable() is None
    kernels = f"kernels for {native.available_isas()[0]}" if usable else "no kernels: reference bodies run"
    return f"{os.cpu_count()} cores of {platform.machine()}, {kernels}, jax {jax.__version__}"


def _build(task: Task, name: str, pipeline: Pipeline, console: Console) -> Built:
    console.print(f"\n{name}: {pipeline}", style="bold", soft_wrap=True)
    with bar(console, "passes") as progress:
        graph, calibration = task.others.get(name, task.graph), list(task.calibration.tokens[:, None])
        step = to_step(pipeline(graph, calibration=calibration, progress=progress))
    for record in step.history:
        console.print(_told(record), soft_wrap=True)
    console.print(f"  cache: {len(step.names('state'))} derived arrays, {_cache_bytes(step):,.0f} bytes a token")
    with bar(console, "compile"):
        program = compile(step)
    console.print(f"  compile: {', '.join(program.calls)} in {program.seconds:.1f} s", soft_wrap=True)
    return Built(name, pipeline, step, program, _save(program, console), _complete(program, task, console))


def _told(record: Record) -> str:
    hits = ", ".join(f"{count} {rule}" for rule, count in record.hits.items())
    before, after = record.equations
    return f"  {record.name}: {before} -> {after} equations; {hits}; {record.seconds:.1f} s"


def _cache_bytes(step: Graph) -> float:
    return state_bytes(step, rows=1, slots=step.max_len) / step.max_len


def _save(program: Program, console: Console) -> int:
    """Saves the program for a moment; returns the bytes of its weight file."""
    with tempfile.TemporaryDirectory() as folder, bar(console, "save"):
        program.save(Path(folder) / "bundle")
        sizes = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    total, weights = sum(sizes.values()), sizes[WEIGHTS]
    console.print(f"  save: {total / 1e6:.2f} MB in {len(sizes)} files, weights {weights / 1e6:.2f} MB")
    return weights


def _complete(program: Program, task: Task, console: Console) -> str:
    console.print("  complete:")
    console.print(task.prompt, end="", style="bold", soft_wrap=True)
    text = ""
    for piece in program.stream(task.prompt, max_tokens=task.max_tokens):
        console.print(piece.text, end="", soft_wrap=True)
        text += piece.text or ""
    console.print()
    return text


def _result(task: Task, built: Built, quality: Quality, speed: Speed) -> Result:
    size = weight_bytes(built.step)
    notes = (note for record in built.step.history for note in record.notes)
    return Result(
        name=built.name,
        passes=str(built.pipeline),
        removed=", ".join(note.removeprefix(REMOVED) for note in notes if note.startswith(REMOVED)),
        disk_bytes=built.disk_bytes,
        read_bytes=size,
        bits_per_weight=8 * size / count_parameters(task.graph),
        cache_bytes=_cache_bytes(built.step),
        quality=quality,
        speed=speed,
        compile_seconds=built.program.seconds,
        completion=built.completion,
    )


def _speculate(
    task: Task, built: Sequence[Built], draftings: Sequence[Drafting], console: Console
) -> Iterator[Drafted]:
    """Decodes the beginnings of all windows with and without each drafter."""
    if not draftings:
        return
    by_name = {each.name: each for each in built}
    quarter = task.windows.shape[1] // 4
    with bar(console, "compile drafters"):
        plain = {each.pipeline: by_name[each.pipeline].program for each in draftings}
        drafted = [_with_drafts(task, by_name[each.pipeline], each) for each in draftings]
    with bar(console, "measure speculation") as progress:
        prompts = task.windows[:, :quarter].tolist()
        found = in_turns([*plain.values(), *drafted], prompts, progress, max_tokens=quarter)
    texts = dict(zip(plain, found, strict=False))
    for each, completions in zip(draftings, found[len(plain) :], strict=True):
        yield judge(each.pipeline, each.drafter, each.gamma, texts[each.pipeline], completions)


def _with_drafts(task: Task, built: Built, drafting: Drafting) -> Program:
    """The draft model goes through the same pipeline as the model that it drafts for."""
    if drafting.drafter == "n-gram":
        draft: Graph | str = "ngram"
    else:
        draft = built.pipeline(task.draft, calibration=list(task.calibration.tokens[:, None]))
    chunks = (task.windows.shape[1] // 4,)  # the prompts are all of this length
    return compile(built.step, chunks=chunks, draft=draft, gamma=drafting.gamma)
