"""From a plan to recipes: what each method needs to know is observed, at once or from the first section to the last."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.passes.quantize.plan import Plan
from xlathe.passes.quantize.recipe import Encode
from xlathe.pipeline import Context
from xlathe.stats import InputStats


def make_recipes(plan: Plan, graph: Graph, context: Context) -> dict[str, Encode]:
    """Returns the recipe of every weight that is quantized.

    A method that reads x^T x runs now, weight by weight in the order of the model, so that each is calibrated on what
    the quantized weights before it make, and x^T x is held for no longer than it is read. Others run when a weight is
    prepared. Raises OptionError where batches are missing, PassError where static activations saw no token.
    """
    makers = {
        e.name: Encode(e.name, e.layout, e.scheme, plan.method)
        for e in plan.entries
        if e.scheme is not None and e.layout is not None
    }
    static = [name for name, scheme in plan.schemes.items() if scheme.is_static]
    if plan.method.statistics == "gram":
        makers = _in_order(graph, makers, context)
    elif plan.method.statistics == "moments" or static or _may_see_experts(plan, graph, context):
        from xlathe.passes.observe import observe  # it reads products as this package does

        found = observe(graph, context.calibration, progress=context.progress).inputs
        makers = {name: dataclasses.replace(make, stats=found.get(name)) for name, make in makers.items()}
    for name, make in makers.items():
        if make.stats is not None:
            _check_finite(name, make.stats)
    for name in static:
        stats = makers[name].stats
        if stats is None or not stats.count:
            raise PassError(
                f"quantize: {name}: static activations need tokens, and none of the calibration reached it"
            )
    return makers


def _may_see_experts(plan: Plan, graph: Graph, context: Context) -> bool:
    return bool(plan.experts) and bool(len(context.calibration)) and not graph.is_step


def _in_order(graph: Graph, makers: Mapping[str, Encode], context: Context) -> dict[str, Encode]:
    from xlathe.passes.quantize.sequential import quantize_in_order

    done = dict(makers)

    def quantize(name: str, stats: InputStats) -> np.ndarray:
        _check_finite(name, stats)
        make = dataclasses.replace(makers[name], stats=stats)
        weight = graph.weights[name]
        parts = make.make(weight)
        done[name] = dataclasses.replace(make, stats=dataclasses.replace(stats, gram=None), made=parts)
        matrix = make.scheme.stored.dequantize(*map(jnp.asarray, parts))
        return make.layout.weight(np.asarray(matrix), np.shape(weight)).astype(weight.dtype)

    quantize_in_order(graph, list(makers), context.calibration, quantize, context.progress)
    return done


def _check_finite(name: str, stats: InputStats) -> None:
    if not stats.is_finite:
        raise PassError(f"quantize: {name}: the activations of the calibration are not all finite")


def told(plan: Plan, graph: Graph, makers: Mapping[str, Encode]) -> tuple[str, ...]:
    """Returns what calibration lacked: experts that it never reached, and fewer tokens than a weight has columns."""
    seen = {name: make.stats for name, make in makers.items() if make.stats is not None}
    notes = [f"{name}: no token of the calibration chose this expert" for name, s in seen.items() if not s.count]
    short = [name for name, stats in seen.items() if 0 < stats.count < len(stats.absmax)]
    if short and plan.method.statistics == "gram":
        notes.append(_short(short, seen))
    return tuple(notes)


def _short(names: Sequence[str], seen: Mapping[str, InputStats]) -> str:
    first = seen[names[0]]
    return (
        f"the calibration is short: {int(first.count)} tokens reached {names[0]}, which sums over {len(first.absmax)} "
        f"columns ({len(names)} weights are like this); what it leaves open is damped"
    )
