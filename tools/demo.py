"""`xlathe demo`: traces the model that ships with xlathe; shapes, compiles and measures it."""

import time
from typing import TYPE_CHECKING

from absl import flags

from xlathe.tools.command import Options, Verb, output_file
from xlathe.tools.console import bar, make_console
from xlathe.tools.mixes import find_mix
from xlathe.tools.source import DEMO_LENGTH, preset, trace_demo
from xlathe.tools.text import held_out_windows, training_rows

if TYPE_CHECKING:
    from xlathe.graph import Graph

# Presets of xlathe.configs, and mixes of llama.cpp, in the order of the tables; the first is what the others are
# compared with.
PIPELINES = ("float32", "int8", "int4", "int4_a8", "gptq", "Q4_K_M", "budget", "pruned", "int8_cache")
# A row that begins with another model of the demo, how it is named, and what was done to it.
HALF = "half"
HALF_NOTE = "removed half the parameters, distilled"
# Who drafts for which of them, and how many tokens at once.
DRAFTINGS = (("float32", "n-gram", 2), ("float32", "n-gram", 4), ("float32", "model", 2), ("int8", "n-gram", 2))


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("prompt", "def read_file(path):", "what is completed", flag_values=values)
    flags.DEFINE_integer("max_tokens", 48, "the most tokens of a completion", flag_values=values)
    flags.DEFINE_integer("eval_tokens", 8192, f"held-out tokens, in windows of {DEMO_LENGTH}", flag_values=values)
    flags.DEFINE_string("json", None, "file for the measured figures", flag_values=values)
    flags.DEFINE_string("html", None, "file for a page of the tables and plots", flag_values=values)


def run(options: Options) -> None:
    from xlathe.report import count_parameters
    from xlathe.tools.page import write_page
    from xlathe.tools.results import sheets
    from xlathe.tools.stages import Drafting, Task, machine, run_stages

    start, file, page = time.perf_counter(), output_file(options, "json"), output_file(options, "html")
    console = make_console()
    with bar(console, "read text"):
        windows, calibration = held_out_windows(options["eval_tokens"]), training_rows()
    console.print(f"A code model of Python's standard library, on {machine()}", soft_wrap=True)
    with bar(console, "trace"):
        began = time.perf_counter()
        graph, draft = trace_demo("target"), trace_demo("draft")
        seconds = time.perf_counter() - began
    console.print(
        f"trace: {len(graph.jaxpr.eqns)} equations over tokens {graph.aval('tokens').str_short()}, "
        f"{len(graph.names('weight'))} weights, {count_parameters(graph):,} parameters; {seconds:.1f} s",
        soft_wrap=True,
    )
    console.print(
        f"calibration: the first {DEMO_LENGTH} tokens of {', '.join(calibration.names)}, none of them held out",
        soft_wrap=True,
    )
    others = {HALF: _half()}
    task = Task(graph, draft, windows, calibration, options["prompt"], options["max_tokens"], others)
    pipelines = [*((name, find_mix(name, graph)) for name in PIPELINES), (HALF, preset("float32"))]
    report = run_stages(task, pipelines, [Drafting(*each) for each in DRAFTINGS], console)
    console.print()
    for sheet in sheets(report):
        console.print(sheet.as_table(), "")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    if file is not None:
        report.write_json(file)
    if page is not None:
        write_page(page, report)


def _half() -> "Graph":
    """Returns the model of half the parameters, which says what it is in its history."""
    from xlathe.graph import Record

    graph = trace_demo(HALF)
    return graph.replace(history=(Record("distill", notes=(HALF_NOTE,)),))


VERB = Verb("demo", "trace, shape, compile, run and measure the model that ships with xlathe", (), define, run)
