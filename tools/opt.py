"""`xlathe opt`: runs passes on a graph and saves the result, as a graph or in the layout of other tools."""

import time
from pathlib import Path
from typing import Final

from absl import flags

from xlathe.tools.command import Options, UsageError, Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.process_memory import memory_of
from xlathe.tools.source import define_pipeline, find_pipeline, open_graph

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
    flags.DEFINE_boolean("print_after_change", False, "print what each pass changed", flag_values=values)


def run(options: Options, source: str, destination: str) -> None:
    import dataclasses

    from xlathe.models.formats.layouts import find_layout
    from xlathe.passes.quantize.work import Work
    from xlathe.tools.text import find_calibration

    console, start = make_console(), time.time()
    pipeline = find_pipeline(options)
    if pipeline is None:
        raise UsageError("which passes? --passes='canonicalize,fuse_attention' or --config=int8")
    if options["verify"]:
        pipeline = dataclasses.replace(pipeline, verify=True)
    if options["layout"]:
        find_layout(options["layout"])  # told before anything runs
    graph = open_graph(source, changing=True)
    with bar(console, "passes") as progress:
        result = pipeline(
            graph,
            calibration=find_calibration(options, source, graph),
            progress=progress,
            dump=options["dump"],
            print_after_change=options["print_after_change"],
            work=(work := Path(destination + UNFINISHED)),
        )
        if options["layout"]:
            result.save_pretrained(destination, layout=options["layout"])
        else:
            result.save(destination)
    Work(work).remove(since=start)
    console.print(result.report(), soft_wrap=True)
    if peak := memory_of("VmHWM"):
        console.print(f"this process held {peak / 1e6:,.0f} MB at its peak, mapped files included", soft_wrap=True)


VERB = Verb(
    "opt",
    "run passes on a graph directory, a checkpoint or the demo, and save the graph",
    ("SOURCE", "OUT"),
    define,
    run,
)
