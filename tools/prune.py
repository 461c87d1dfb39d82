"""`xlathe prune`: makes a model smaller as it is, to a budget or by shares, and says beforehand what goes."""

from pathlib import Path

from absl import flags

from xlathe.tools.command import Options, UsageError, Verb, output_file
from xlathe.tools.console import bar, make_console
from xlathe.tools.distill import fused
from xlathe.tools.source import define_calibration, open_graph
from xlathe.tools.text import find_calibration


def define(values: flags.FlagValues) -> None:
    define_calibration(values)
    flags.DEFINE_float("params", None, "the fraction of the parameters to keep, 0.5", flag_values=values)
    flags.DEFINE_float("megabytes", None, "10^6 bytes of weights to keep", flag_values=values)
    flags.DEFINE_float("latency", None, "milliseconds of a decoded token, as measured here", flag_values=values)
    flags.DEFINE_float("heads", None, "or the fraction of key-value heads to remove", flag_values=values)
    flags.DEFINE_float("neurons", None, "the fraction of neurons to remove", flag_values=values)
    flags.DEFINE_float("hidden", None, "the fraction of the residual stream's features to remove", flag_values=values)
    flags.DEFINE_float("experts", None, "the fraction of each layer's experts to remove", flag_values=values)
    flags.DEFINE_float("value_dims", None, "the fraction of the channels of values to remove", flag_values=values)
    flags.DEFINE_float(
        "query_key_dims", None, "the fraction of the channels of queries and keys to remove", flag_values=values
    )
    flags.DEFINE_integer("layers", None, "how many layers to remove", flag_values=values)
    flags.DEFINE_string(
        "score", "activation", "what matters is told by: activation, taylor, weight or weight_l1", flag_values=values
    )
    flags.DEFINE_boolean("force", False, "cut features by the size of weights, which ruins models", flag_values=values)
    flags.DEFINE_string("plan", None, "file for the plan, which distill --plan reads", flag_values=values)
    flags.DEFINE_boolean("plan_only", False, "print the plan, and write nothing to OUT", flag_values=values)


def run(options: Options, source: str, destination: str) -> None:
    from xlathe.passes.prune import PruneStructured, prune, record
    from xlathe.passes.prune.plan import WORDS
    from xlathe.passes.prune.search import BUDGETS
    from xlathe.pipeline import Context

    sizes = (*BUDGETS, *WORDS, "layers")
    shape = {name: options[name] for name in sizes if options[name] is not None}
    if not shape:
        others = ", ".join(f"--{name}" for name in sizes[1:])
        raise UsageError(f"how small? --params=0.5, or one of {others}")
    chosen = PruneStructured(score=options["score"], force=options["force"], **shape)
    file = output_file(options, "plan")
    console = make_console()
    with bar(console, "load"):
        graph = fused(open_graph(source, changing=True))
        calibration = find_calibration(options, source, graph)
    with bar(console, "plan") as progress:
        plan = chosen.make_plan(graph, Context(calibration, progress=progress))
    console.print(str(plan), soft_wrap=True)
    if file is not None:
        plan.save(file)
    if options["plan_only"]:
        return
    with bar(console, "prune"):
        small = prune(graph, plan)
        small.replace(history=(*small.history, record(plan))).save(Path(destination))
    console.print(f"{destination}: without {plan.removed}", soft_wrap=True)


VERB = Verb("prune", "remove heads, neurons, features and layers, to a budget", ("SOURCE", "OUT"), define, run)
