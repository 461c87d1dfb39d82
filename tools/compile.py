"""`xlathe compile`: a graph directory, or the demo's model, becomes a bundle; or a plan of what one would take."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xlathe.errors import OptionError
from xlathe.tools.command import Options, UsageError, Verb, output_file
from xlathe.tools.console import bar, make_console
from xlathe.tools.source import define_pipeline, find_pipeline, open_graph, open_shapes

if TYPE_CHECKING:
    from rich.console import Console

    from xlathe.graph import Graph
    from xlathe.memory import MemoryPlan
    from xlathe.pipeline import Pipeline
    from xlathe.target import Target

_UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}


def define(values: flags.FlagValues) -> None:
    define_pipeline(values)
    flags.DEFINE_integer("max_batch", 1, "the most rows at once", flag_values=values)
    flags.DEFINE_integer(
        "max_len", None, "the most tokens a row, answer included; default: the graph's", flag_values=values
    )
    flags.DEFINE_string(
        "target", None, "cpu, h100, tpu-v5e, ..., which need not be here; default: this machine", flag_values=values
    )
    flags.DEFINE_string(
        "activations",
        None,
        "how those are rounded that packed weights of a checkpoint are multiplied with: int8, as llama.cpp does",
        flag_values=values,
    )
    flags.DEFINE_string("memory", None, "of the target, 48GB; default: what its kind has", flag_values=values)
    flags.DEFINE_string("json", None, "a file for the memory plan", flag_values=values)
    flags.DEFINE_boolean(
        "shapes_only",
        False,
        "only plan: SOURCE may be a JSON file of a model's sizes, and OUT is a file for the plan",
        flag_values=values,
    )


def run(options: Options, source: str, destination: str) -> None:
    console, file = make_console(), output_file(options, "json")
    memory = _bytes(options["memory"])
    if options["shapes_only"]:
        plan = _plan(options, source, memory, console)
        _show(plan, [Path(destination), *([file] if file else [])], console)
        return
    _build(options, source, destination, memory, file, console)


def _plan(options: Options, source: str, memory: int | None, console: "Console") -> "MemoryPlan":
    from xlathe.aot import CHUNKS, UNIT, Buckets, to_step
    from xlathe.offline import plan_for

    machine, graph = _machine(options), _shaped(options, source, console)
    buckets = Buckets.of(options["max_batch"], options["max_len"] or graph.max_len, UNIT, CHUNKS)
    with bar(console, "plan"):
        return plan_for(to_step(graph), buckets, machine, memory=memory)


def _build(
    options: Options, source: str, destination: str, memory: int | None, file: Path | None, console: "Console"
) -> None:
    import dataclasses

    from xlathe.errors import XlatheError
    from xlathe.program import compile

    graph = _shaped(options, source, console)
    with bar(console, "compile"):
        program = compile(
            graph,
            max_batch=options["max_batch"],
            max_len=options["max_len"],
            target=options["target"],
        )
    plan = program.memory if memory is None else dataclasses.replace(program.memory, memory=memory)
    _show(plan, [file] if file else [], console)
    if not plan.fits:
        raise XlatheError(plan.shortage)
    with bar(console, "save"):
        program.save(destination)
    console.print(
        f"{destination}: {program.buckets.programs} programs for {program.target}, compiled in {program.seconds:.1f} s",
        soft_wrap=True,
    )


def _shaped(options: Options, source: str, console: "Console") -> "Graph":
    """Returns the graph of a source after the passes that were asked for."""
    from xlathe.tools.text import find_calibration

    pipeline = find_pipeline(options)
    if pipeline is not None:
        _check_schemes(pipeline, _machine(options))
    if source.endswith(".json"):
        if not options["shapes_only"] or not options["max_len"]:
            raise UsageError(f"{source} has sizes and no weights: it can be planned, --shapes_only --max_len=8192")
        graph = open_shapes(source, options["max_len"])
    else:
        graph = open_graph(source, changing=pipeline is not None, activations=options["activations"])
    if pipeline is None:
        return graph
    with bar(console, "passes") as progress:
        return pipeline(graph, calibration=find_calibration(options, source, graph), progress=progress)


def _machine(options: Options) -> "Target":
    """Returns the machine that the program is for."""
    from xlathe.offline import target_here
    from xlathe.target import find_target

    return find_target(options["target"]) if options["target"] else target_here()


def _check_schemes(pipeline: "Pipeline", machine: "Target") -> None:
    """Raises OptionError where the target lacks what a scheme multiplies: passes may run for hours before lowering."""
    from xlathe.passes import Quantize
    from xlathe.target import unit_of

    for step in pipeline.passes:
        for rule in step.parsed_rules() if isinstance(step, Quantize) else ():
            if rule.scheme is not None:
                unit_of(machine, rule.scheme.activations)


def _show(plan: "MemoryPlan", files: Sequence[Path], console: "Console") -> None:
    for file in files:
        file.write_text(plan.to_json(), encoding="utf-8")
    console.print(plan.to_text(), soft_wrap=True)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if match is None or match[2] not in _UNITS:
        raise OptionError(f"--memory={text}: expected a number of {', '.join(_UNITS)}, as in 48GB")
    return round(float(match[1]) * _UNITS[match[2]])


VERB = Verb("compile", "compile a checkpoint, a graph or the word demo into a bundle", ("SOURCE", "OUT"), define, run)
