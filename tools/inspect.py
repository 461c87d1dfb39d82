"""`xlathe inspect`: what is in a graph directory or a bundle."""

from pathlib import Path

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.source import is_bundle, open_graph


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean(
        "text", False, "print the program of a graph instead of the report", flag_values=values
    )


def run(options: Options, source: str) -> None:
    if is_bundle(source):
        print((Path(source) / "manifest.json").read_text(encoding="utf-8"))
        return
    graph = open_graph(source)
    if options["text"]:
        from xlathe.printer import to_text

        print(to_text(graph, sources=True))
    else:
        print(graph.report())


VERB = Verb("inspect", "report on a checkpoint, a graph directory, the demo or a bundle", ("SOURCE",), define, run)
