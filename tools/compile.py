"""`xlathe compile`: a graph directory, or the demo's model, becomes a bundle."""

from absl import flags

from xlathe.tools.command import Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.source import define_pipeline, find_pipeline, open_graph, stop_tokens


def define(values: flags.FlagValues) -> None:
    define_pipeline(values)
    flags.DEFINE_integer("max_batch", 1, "the most rows at once", flag_values=values)
    flags.DEFINE_integer(
        "max_len", None, "the most tokens a row, answer included; default: the graph's", flag_values=values
    )
    flags.DEFINE_string("target", None, "what to compile for; default: cpu", flag_values=values)


def run(values: flags.FlagValues, source: str, destination: str) -> None:
    from xlathe.program import compile

    console = make_console()
    pipeline = find_pipeline(values)
    graph = open_graph(source)
    with bar(console, "passes") as progress:
        if pipeline is not None:
            graph = pipeline(graph, progress=progress)
    with bar(console, "compile"):
        program = compile(
            graph,
            max_batch=values["max_batch"].value,
            max_len=values["max_len"].value,
            target=values["target"].value,
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
