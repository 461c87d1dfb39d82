"""Calibration rows on their way through a model, one section at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xlathe import jaxpr as ir
from xlathe.graph import Graph, Weights
from xlathe.passes.observe import Found, Products, add_found
from xlathe.passes.quantize.compiled import Compiled
from xlathe.passes.quantize.stages import Stage
from xlathe.sections import cut_points
from xlathe.stats import InputStats

Values = list[jax.Array]


class Current:
    """The weights and constants of a graph as they are by now, of which those of one section are held.

    A weight that was replaced is made anew, by the function that it was replaced with, when it is asked for again.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.replaced: dict[str, Callable[[], Any]] = {}
        self.held: dict[str, jax.Array] = {}

    def hold(self, names: Iterable[str]) -> None:
        """Drops all but these."""
        wanted = set(names)
        self.held = {name: array for name, array in self.held.items() if name in wanted}

    def replace(self, name: str, make: Callable[[], Any]) -> None:
        """Says what a weight is from now on."""
        self.replaced[name] = make
        self.held.pop(name, None)

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self.held:
            value = self.replaced[name]() if name in self.replaced else self.weights[name]
            self.held[name] = jax.numpy.asarray(value)
        return self.held[name]


class Walk:
    """Rows of tokens, one after the other, at one cut point of a model.

    A row is a batch of its own: what comes of it depends neither on how rows were given in batches, nor on the threads
    that share the work on a larger one. at: the cut point, None at the beginning; values: there, one a row.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Mapping[str, np.ndarray]],
        current: Current,
        compiled: Compiled | None = None,
    ) -> None:
        self.graph, self.current = graph, current
        self.rows = [
            {name: array[i : i + 1] for name, array in batch.items()}
            for batch in batches
            for i in range(len(batch["tokens"]))
        ]
        self.cuts = cut_points(graph)
        self.at: ir.Var | None = None
        self.values: Values = []
        self.compiled = Compiled() if compiled is None else compiled

    def observe(self, stage: Stage, *, gram: bool) -> dict[str, InputStats]:
        """Returns what a stage sees, of one weight of each group of readers."""
        total: dict[str, InputStats] = {}
        products = stage.products
        for row in range(len(self.rows)):
            add_found(total, self._sums(products, self._between(row, products.values), gram))
        return total

    def advance(self, end: ir.Var) -> None:
        """Moves on to a cut point."""
        done = self.cuts.index(self.at) + 1 if self.at is not None else 0
        for cut in self.cuts[done : self.cuts.index(end) + 1]:
            values = self.values or [jax.numpy.zeros(())] * len(self.rows)
            for row in range(len(self.rows)):
                values[row] = self._between(row, [cut])[0]  # in place: what was there is not read again
            self.at, self.values = cut, values

    def outputs(self, wanted: ir.Var) -> Values:
        """Returns a value of each row, which stays where it is."""
        return [self._between(row, [wanted])[0] for row in range(len(self.rows))]

    def needed(self, wanted: Iterable[ir.Var]) -> list[str]:
        """Returns the inputs that values depend on from here, in the order of their first use."""
        return needed_inputs(self.graph, self.at, wanted)

    def function(self, wanted: Sequence[ir.Var], names: Sequence[str], length: int) -> Callable[..., Values]:
        """Returns the function (inputs of these names, values here) -> wanted values, of a row of some length."""
        graph, known = self.graph, [] if self.at is None else [self.at]

        def run(inputs: Sequence[Any], values: Sequence[Any]) -> Values:
            given = dict(zip(names, inputs, strict=True))
            operands = [given.get(item.name) for item in graph.inputs]
            here = dict(zip(known, values, strict=True))
            return ir.evaluate_between(graph.jaxpr, operands, here, wanted, {"b": 1, "t": length})

        return run

    def inputs(self, names: Sequence[str], row: int) -> list[Any]:
        """Returns the arrays of inputs: what a row is given, or weights as they are by now."""
        given = self.rows[row]
        return [given[name] if name in given else self.current[name] for name in names]

    def _between(self, row: int, wanted: Sequence[ir.Var]) -> Values:
        """Returns values of a row; they are there when this returns, so that no two rows are under way."""
        names = self.needed(wanted)
        arguments = (self.inputs(names, row), self.values[row : row + 1])
        length = self.rows[row]["tokens"].shape[1]
        key = (self.at, *wanted, length)
        run = self.compiled(key, self.function(wanted, names, length), *arguments)
        found: Values = jax.block_until_ready(run(*arguments))
        return found

    def _sums(self, products: Products, values: Values, gram: bool) -> Found:
        def run(values: Sequence[Any]) -> list[Any]:
            return [sums for found in products.statistics(values, gram).values() for sums in found]

        sums = self.compiled((*products.values, *(value.shape for value in values), gram), run, values)(values)
        names = [*products.plain, *(name for group in products.experts for name in group.names)]
        return {name: [each] for name, each in zip(names, sums, strict=True)}


def needed_inputs(graph: Graph, start: ir.Var | None, wanted: Iterable[ir.Var]) -> list[str]:
    """Returns the inputs that values depend on where `start` is known, in the order of their first use."""
    known, goal = [] if start is None else [start], list(wanted)
    by_var = {var: item.name for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True)}
    read = [a for eqn in ir.equations_between(graph.jaxpr, known, goal) for a in eqn.invars] + goal
    return list(dict.fromkeys(by_var[a] for a in read if isinstance(a, ir.Var) and a in by_var))
