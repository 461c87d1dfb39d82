"""`xlathe inspect`: what is in a graph directory or a bundle, and what a quantizer would make of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from xlathe.tools.command import Options, UsageError, Verb
from xlathe.tools.source import define_pipeline, find_pipeline, is_bundle, open_graph

if TYPE_CHECKING:
    from xlathe.graph import Graph
    from xlathe.passes import Quantize
    from xlathe.passes.quantize.plan import Plan
    from xlathe.pipeline import Pipeline


def define(values: flags.FlagValues) -> None:
    define_pipeline(values)
    flags.DEFINE_boolean(
        "text", False, "print the program of a graph instead of the report", flag_values=values
    )
    flags.DEFINE_boolean(
        "plan", False, "print which scheme --passes or --config gives each weight, and its bytes", flag_values=values
    )
    flags.DEFINE_boolean("json", False, "print the plan as JSON", flag_values=values)


def run(options: Options, source: str) -> None:
    pipeline = find_pipeline(options)
    if (pipeline is not None) != options["plan"] or options["json"] > options["plan"]:
        raise UsageError("--plan goes with --passes or --config, whose plan it prints, and --json with --plan")
    if is_bundle(source):
        if options["plan"] or options["text"]:
            raise UsageError(f"{source} is a bundle, which has a manifest alone; --plan and --text go with graphs")
        print((Path(source) / "manifest.json").read_text(encoding="utf-8"))
        return
    graph = open_graph(source, changing=pipeline is not None)
    if pipeline is not None:
        from xlathe.tools.text import find_calibration

        calibration = find_calibration(options, source, graph)
        for plan, before, chosen in plans(pipeline, graph, calibration):
            text, content = told(plan, before, calibration)
            if options["json"]:
                print(json.dumps(content, indent=2))
            else:
                print(text)
                print(f"chosen: {chosen}\n" if chosen else "", end="")
    elif options["text"]:
        from xlathe.printer import to_text

        print(to_text(graph, sources=True))
    else:
        print(graph.report())


def told(plan: "Plan", graph: "Graph", calibration: Any) -> tuple[str, dict[str, Any]]:
    """Returns a plan as text and for JSON, with the memory that it takes where its method goes through the model in
    order and there is what it reads."""
    from xlathe.passes.quantize.calibrate import IN_ORDER
    from xlathe.passes.quantize.footprint import footprint

    content = json.loads(plan.to_json())
    known = plan.method.statistics in IN_ORDER and len(calibration)
    memory = footprint(graph, plan, calibration, on_disk=True) if known else None
    return (str(plan), content) if memory is None else (f"{plan}\n{memory}", content | memory.to_json())


def plans(
    pipeline: "Pipeline", graph: "Graph", calibration: Any
) -> "Iterator[tuple[Plan, Graph, Quantize | None]]":
    """Yields the plan of each quantizer in a pipeline, the graph that it is for, and the pass that a budget became.

    What follows the last is not run, nor is that one. Raises OptionError where a pipeline has none.
    """
    from xlathe.errors import OptionError
    from xlathe.passes import Budget, Quantize
    from xlathe.pipeline import Context, Pass

    left = sum(isinstance(each, Quantize | Budget) for each in pipeline.passes)
    if not left:
        raise OptionError(f"{pipeline} has no pass quantize, whose plan could be told")
    context = Context(calibration)
    for pass_ in pipeline.passes:
        assert isinstance(pass_, Pass)
        chosen = pass_.choose(graph, context).quantize if isinstance(pass_, Budget) else None
        quantize = chosen or pass_
        if isinstance(quantize, Quantize):
            yield quantize.plan(graph), graph, chosen
            left -= 1
            if not left:
                return
        graph = quantize(graph, context)


VERB = Verb("inspect", "report on a checkpoint, a graph directory, the demo or a bundle", ("SOURCE",), define, run)
