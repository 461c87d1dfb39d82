"""`xlathe opt`: runs passes on a graph and saves the result, as a graph or in the layout of other tools."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from absl import flags

from xlathe.tools.command import Options, UsageError, Verb, output_file
from xlathe.tools.console import bar, make_console
from xlathe.tools.process_memory import memory_of
from xlathe.tools.source import define_pipeline, find_pipeline, open_graph

if TYPE_CHECKING:
    from rich.console import Console

    from xlathe.graph import Graph
    from xlathe.passes.quantize.plan import Plan
    from xlathe.passes.quantize.work import Work

UNFINISHED: Final = ".unfinished"
"""After the name of the result: the folder where an interrupted run left what it had finished."""


def define(values: flags.FlagValues) -> None:
    define_pipeline(values)
    flags.DEFINE_boolean(
        "verify", False, "check on drawn tokens that each pass keeps what it promises", flag_values=values
    )
    flags.DEFINE_string(
        "dump", None, "directory for the graph after every pass, and a reproducer", flag_values=values
    )
    flags.DEFINE_string(
        "layout",
        None,
        "write a Hugging Face directory with quantized weights as other tools read them: gptq, gptq_v2, awq or "
        "compressed-tensors",
        flag_values=values,
    )
    flags.DEFINE_string(
        "plan", None, "file for the plans of passes that quantize, a list in JSON", flag_values=values
    )
    flags.DEFINE_boolean("print_after_change", False, "print what each pass changed", flag_values=values)


def run(options: Options, source: str, destination: str) -> None:
    import dataclasses

    from xlathe.models.formats.layouts import find_layout
    from xlathe.passes.quantize.work import Work
    from xlathe.tools.text import find_calibration

    console, file = make_console(), output_file(options, "plan")
    pipeline = find_pipeline(options)
    if pipeline is None:
        raise UsageError("which passes? --passes='canonicalize,fuse_attention' or --config=int8")
    if options["verify"]:
        pipeline = dataclasses.replace(pipeline, verify=True)
    if options["layout"]:
        find_layout(options["layout"])  # told before anything runs
    graph = open_graph(source, changing=True)
    calibration = find_calibration(options, source, graph)
    work = Work(Path(destination + UNFINISHED))
    with _kept(work, console), bar(console, "passes") as progress:
        result = pipeline(
            graph,
            calibration=calibration,
            progress=progress,
            dump=options["dump"],
            print_after_change=options["print_after_change"],
            work=work.folder,
            planned=_teller(console, calibration, file),
        )
        if options["layout"]:
            result.save_pretrained(destination, layout=options["layout"])
        else:
            result.save(destination)
    console.print(result.report(), soft_wrap=True)
    if peak := memory_of("VmHWM"):
        console.print(f"this process held {peak / 1e6:,.0f} MB at its peak, mapped files included", soft_wrap=True)


def _teller(
    console: "Console", calibration: Sequence[Any], file: Path | None
) -> "Callable[[Plan, Graph], None]":
    """Returns a function that prints each plan, and writes all so far to a file."""
    from xlathe.files import replaced
    from xlathe.tools.inspect import told

    plans: list[dict[str, Any]] = []

    def keep() -> None:
        if file is not None:
            with replaced(file) as out:
                out.write((json.dumps(plans, indent=1) + "\n").encode())

    def tell(plan: "Plan", graph: "Graph") -> None:
        text, content = told(plan, graph, calibration)
        console.print(text, soft_wrap=True)
        plans.append(content)
        keep()

    keep()  # an older file of that name says nothing of this run
    return tell


@contextlib.contextmanager
def _kept(work: "Work", console: "Console") -> Iterator[None]:
    """Removes what a run kept for its next attempt when it ends well, and says that it lies there when it does not."""
    start = time.time()
    try:
        yield
    except BaseException:
        if count := work.finished(since=start):
            console.print(
                f"{work.folder} keeps {count} finished sections: the same command goes on from there, others do not",
                soft_wrap=True,
            )
        raise
    work.remove(since=start)


VERB = Verb(
    "opt",
    "run passes on a graph directory, a checkpoint or the demo, and save the graph",
    ("SOURCE", "OUT"),
    define,
    run,
)
