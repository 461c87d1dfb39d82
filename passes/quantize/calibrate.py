"""From a plan to recipes: what each method needs to know is observed, at once or from the first section to the last."""

import dataclasses
from collections.abc import Mapping

from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.passes.quantize.enough import few_for_averages, few_for_products, unreached
from xlathe.passes.quantize.plan import Plan
from xlathe.passes.quantize.recipe import Encode, check_calibrated
from xlathe.pipeline import Context

IN_ORDER = ("gram", "section")
"""Statistics that are of a model whose weights are quantized up to there."""


def make_recipes(plan: Plan, graph: Graph, context: Context) -> tuple[dict[str, Encode], tuple[str, ...]]:
    """Returns the recipe of every weight that is quantized, and what the run report should say.

    A method that reads x^T x, or what a section puts out, runs now, in the order of the model, so that each weight is
    calibrated on what the quantized weights before it make. Others run when a weight is prepared. Raises OptionError
    where batches are missing, PassError where static activations saw no token.
    """
    encoders = {
        e.name: Encode(e.name, e.layout, e.scheme, plan.method)
        for e in plan.entries
        if e.scheme is not None and e.layout is not None
    }
    static = [name for name, scheme in plan.schemes.items() if scheme.is_static]
    notes: tuple[str, ...] = ()
    if plan.method.statistics in IN_ORDER:
        from xlathe.passes.quantize.footprint import footprint
        from xlathe.passes.quantize.sequential import quantize_sequentially

        encoders, notes = quantize_sequentially(graph, encoders, plan.method, context)
        held = footprint(graph, plan, context.calibration, on_disk=context.work is not None)
        notes = (*notes, *([] if held is None else [str(held)]))
    elif plan.method.statistics == "moments" or static or _may_see_experts(plan, graph, context):
        from xlathe.passes.observe import observe  # it reads products as this package does

        found = observe(graph, context.calibration, progress=context.progress).inputs
        encoders = {name: dataclasses.replace(encode, stats=found.get(name)) for name, encode in encoders.items()}
    for name, encode in encoders.items():
        if encode.stats is not None:
            check_calibrated(name, encode.stats)
    for name in static:
        stats = encoders[name].stats
        if stats is None or not stats.count:
            raise PassError(
                f"quantize: {name}: static activations need tokens, and none of the calibration reached it"
            )
    return encoders, (*_told(plan, encoders), *notes)


def _may_see_experts(plan: Plan, graph: Graph, context: Context) -> bool:
    return bool(plan.experts) and bool(len(context.calibration)) and not graph.is_step


def _told(plan: Plan, encoders: Mapping[str, Encode]) -> tuple[str, ...]:
    """Returns what calibration lacked for what is read of it."""
    seen = {name: encode.stats for name, encode in encoders.items() if encode.stats is not None}
    reads = plan.method.statistics
    averaged = {name: stats for name, stats in seen.items() if reads == "moments" or encoders[name].scheme.is_static}
    return (
        *unreached(seen),
        *few_for_products(seen if reads in IN_ORDER else {}),
        *few_for_averages(averaged),
    )
