"""`xlathe compile`: a graph directory, or the demo's model, becomes a bundle."""

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.source import define_pipeline, find_pipeline, open_graph, stop_tokens


def define(values: flags.FlagValues) -> None:
    define_pipeline(values)
    flags.DEFINE_integer("max_batch", 1, "the most rows at once", flag_values=values)
    flags.DEFINE_integer(
        "max_len", None, "the most tokens a row, answer included; default: the graph's", flag_values=values
    )
    flags.DEFINE_string("target", None, "what to compile for; default: cpu", flag_values=values)


def run(options: Options, source: str, destination: str) -> None:
    from xlathe.program import compile
    from xlathe.tools.text import find_calibration

    console = make_console()
    pipeline = find_pipeline(options)
    graph = open_graph(source)
    if pipeline is not None:
        with bar(console, "passes") as progress:
            graph = pipeline(graph, calibration=find_calibration(options, source, graph), progress=progress)
    with bar(console, "compile"):
        program = compile(
            graph,
            max_batch=options["max_batch"],
            max_len=options["max_len"],
            target=options["target"],
            stop_tokens=stop_tokens(source),
        )
    with bar(console, "save"):
        program.save(destination)
    console.print(
        f"{destination}: {len(program.calls)} programs, compiled in {program.seconds:.1f} s", soft_wrap=True
    )


VERB = Verb(
    "compile", "compile a graph directory, or the word demo, into a bundle", ("SOURCE", "OUT"), define, run
)
