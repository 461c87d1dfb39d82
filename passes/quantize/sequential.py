"""Quantize a model from its first product to its last, so that each weight is calibrated on what it will get.

Between sections of the model nothing is kept of activations but those at a cut point of the residual stream, and one
stage's sums of x^T x. The weights are all held, as they are by now.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xlathe import jaxpr as ir
from xlathe.graph import Graph
from xlathe.passes.observe import Products, add_found, check_calibration, find_products
from xlathe.sections import cut_points
from xlathe.stats import InputStats

Round = Callable[[str, InputStats], np.ndarray]
"""Quantizes the weight of a name, and returns what it stands for from then on, in the weight's shape."""


def quantize_in_order(
    graph: Graph,
    names: Sequence[str],
    batches: Sequence[Any],
    quantize: Round,
    progress: Callable[[str, float], None] = lambda description, fraction: None,
) -> None:
    """Calls `quantize` once for every weight that is multiplied with activations, from the first to the last.

    Each gets statistics, with `gram`, of its activations when all weights before it are what `quantize` returned. A
    weight that several values are multiplied with gets the statistics of all of them, at the last one; what it makes of
    the others, or of look-ups (a tied embedding), is as it was before. Raises OptionError without batches.
    """
    stages = _stages(graph, find_products(graph, names))
    run = _Run(graph, check_calibration(graph, batches))
    left = {name: sum(name in _names(stage) for stage in stages) for name in names}
    total: dict[str, InputStats] = {}
    for number, stage in enumerate(stages):
        total = run.observe(stage, total)
        for name in _names(stage):
            left[name] -= 1
            if not left[name]:
                run.arrays[name] = jax.numpy.asarray(quantize(name, total.pop(name)))
        progress("quantizing", (number + 1) / len(stages))


def _stages(graph: Graph, products: Products) -> list[Products]:
    """Returns the products with each value, in the order in which the model makes the values."""
    order = _order(graph)
    plain: dict[ir.Var, dict[str, list[tuple[ir.Var, tuple[int, ...]]]]] = {}
    for name, inputs in products.plain.items():
        for var, axes in inputs:
            plain.setdefault(var, {}).setdefault(name, []).append((var, axes))
    stages = [Products(inputs) for inputs in plain.values()] + [Products({}, [group]) for group in products.experts]
    return sorted(stages, key=lambda stage: max(order.get(var, -1) for var in stage.values))


def _order(graph: Graph) -> dict[ir.Var, int]:
    return {out: i for i, eqn in enumerate(graph.jaxpr.eqns) for out in eqn.outvars}


def _names(stage: Products) -> list[str]:
    return [*stage.plain, *(name for group in stage.experts for name in group.names)]


class _Run:
    """The calibration batches on their way through the model. arrays: the weights, as they are by now."""

    def __init__(self, graph: Graph, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.graph, self.batches, self.arrays = graph, batches, dict(graph.arrays)
        self.order, self.cuts = _order(graph), cut_points(graph)
        self.known: list[dict[ir.Var, jax.Array]] = [{} for _ in batches]

    def observe(self, stage: Products, total: Mapping[str, InputStats]) -> dict[str, InputStats]:
        """Adds the statistics of a stage."""
        self._advance(min(self.order.get(var, -1) for var in stage.values))
        run, result = self._compiled(stage.values, lambda values: stage.statistics(values, gram=True)), dict(total)
        for batch, known in zip(self.batches, self.known, strict=True):
            result = add_found(result, run(self.arrays, batch, list(known.values())))
        return result

    def _advance(self, end: int) -> None:
        """Moves on to the last cut point before an equation."""
        passed = [cut for cut in self.cuts if self.order.get(cut, -1) <= end]
        if not passed or passed[-1] in self.known[0]:
            return
        run = self._compiled(passed[-1:], lambda values: values)
        for batch, known in zip(self.batches, list(self.known), strict=True):
            (value,) = run(self.arrays, batch, list(known.values()))
            known.clear()
            known[passed[-1]] = value

    def _compiled(self, wanted: Sequence[ir.Var], finish: Callable[[list[jax.Array]], Any]) -> Callable[..., Any]:
        given = list(self.known[0])

        @jax.jit
        def run(arrays: Mapping[str, Any], batch: Mapping[str, Any], values: Sequence[Any]) -> Any:
            rows, length = batch["tokens"].shape
            operands = self.graph.bind_names({**arrays, **batch})
            known = dict(zip(given, values, strict=True))
            sizes = {"b": rows, "t": length}
            return finish(ir.evaluate_between(self.graph.jaxpr, operands, known, wanted, sizes))

        return run
