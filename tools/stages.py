"""The stages of `xlathe demo`: each does its work, and tells in a line or two what came out."""

import dataclasses
import os
import platform
import tempfile
from collections.abc import Sequence
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
from xlathe.tools.measure import Quality, Speed, quality, speeds
from xlathe.tools.results import Conditions, Result

ROUNDS = 5  # of measuring speed: half a window as the prompt, a quarter of its length as the answer


@dataclasses.dataclass(frozen=True)
class Task:
    """What the demo does with every pipeline.

    graph: as traced; windows: held-out int32 [n, length], 2 <= n, 4 <= length <= the graph's max_len;
    prompt: completed by up to max_tokens tokens.
    """

    graph: Graph
    windows: np.ndarray
    prompt: str
    max_tokens: int
    stop_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Built:
    """A pipeline's way through all stages but the measurement of speed."""

    name: str
    passes: str
    shaped: Graph
    program: Program
    disk_bytes: int
    quality: Quality


def run_stages(
    task: Task, pipelines: Sequence[tuple[str, Pipeline]], console: Console
) -> tuple[list[Result], Conditions]:
    """Takes a graph through every pipeline, and measures the speeds of all in turns.

    The result of the first pipeline is what the quality of all is compared with.
    """
    built: list[Built] = []
    for name, pipeline in pipelines:
        console.print(f"\n{name}: {pipeline}", style="bold", soft_wrap=True)
        built.append(_build(task, name, pipeline, built[0].shaped if built else None, console))
    windows, length = task.windows.shape
    prompt, new_tokens = task.windows[0, : length // 2].tolist(), length // 4
    with bar(console, "measure speed") as progress:
        programs = [(each.program, weight_bytes(each.shaped)) for each in built]
        measured = speeds(programs, prompt, new_tokens, ROUNDS, progress)
    results = [_result(task, each, speed) for each, speed in zip(built, measured, strict=True)]
    return results, Conditions(machine(), windows, length, ROUNDS, len(prompt), new_tokens)


def machine() -> str:
    """Returns what the figures depend on: processor, instruction set of the kernels, version of JAX."""
    usable = native.unusable() is None
    kernels = f"kernels for {native.available_isas()[0]}" if usable else "no kernels: reference bodies run"
    return f"{os.cpu_count()} cores of {platform.machine()}, {kernels}, jax {jax.__version__}"


def _build(task: Task, name: str, pipeline: Pipeline, reference: Graph | None, console: Console) -> Built:
    with bar(console, "passes") as progress:
        shaped = pipeline(task.graph, progress=progress)
        step = to_step(shaped)
    derived = () if shaped.is_step else step.history[-1:]
    for record in (*shaped.history, *derived):
        console.print(_told(record), soft_wrap=True)
    cached = state_bytes(step, rows=1, slots=step.max_len)
    console.print(f"  cache: {len(step.names('state'))} derived arrays, {cached / step.max_len:,.0f} bytes a token")
    with bar(console, "compile"):
        program = compile(step, max_batch=1, max_len=task.graph.max_len, stop_tokens=task.stop_tokens)
    console.print(f"  compile: {', '.join(program.calls)} in {program.seconds:.1f} s", soft_wrap=True)
    disk_bytes = _save(program, console)
    _complete(program, task, console)
    with bar(console, "evaluate") as progress:
        measured = quality(reference or shaped, shaped, task.windows, progress)
    told = f"  held out: perplexity {measured.perplexity}, KL divergence {measured.kl} nats a token"
    console.print(told, soft_wrap=True)
    return Built(name, str(pipeline), shaped, program, disk_bytes, measured)


def _told(record: Record) -> str:
    hits = ", ".join(f"{count} {rule}" for rule, count in record.hits.items())
    before, after = record.equations
    return f"  {record.name}: {before} -> {after} equations; {hits}; {record.seconds:.1f} s"


def _save(program: Program, console: Console) -> int:
    """Saves the program for a moment; returns the bytes of its weight file."""
    with tempfile.TemporaryDirectory() as folder, bar(console, "save"):
        program.save(Path(folder) / "bundle")
        sizes = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    total, weights = sum(sizes.values()), sizes[WEIGHTS]
    console.print(f"  save: {total / 1e6:.2f} MB in {len(sizes)} files, weights {weights / 1e6:.2f} MB")
    return weights


def _complete(program: Program, task: Task, console: Console) -> None:
    console.print("  complete:")
    console.print(task.prompt, end="", style="bold", soft_wrap=True)
    for piece in program.stream(task.prompt, max_tokens=task.max_tokens):
        console.print(piece.text, end="", soft_wrap=True)
    console.print()


def _result(task: Task, built: Built, speed: Speed) -> Result:
    size = weight_bytes(built.shaped)
    return Result(
        name=built.name,
        passes=built.passes,
        disk_bytes=built.disk_bytes,
        read_bytes=size,
        bits_per_weight=8 * size / count_parameters(task.graph),
        quality=built.quality,
        speed=speed,
        compile_seconds=built.program.seconds,
    )
