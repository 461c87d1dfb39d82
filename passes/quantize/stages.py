"""In which order the weights of a model are calibrated, and where the way through it can be interrupted."""

import dataclasses
from collections.abc import Mapping, Sequence

from xlathe import jaxpr as ir
from xlathe.graph import Graph
from xlathe.passes.observe import Products, find_products
from xlathe.sections import cut_points


@dataclasses.dataclass(frozen=True)
class Stage:
    """The products that sum over the same axes of one value, or those with the rows of one group of experts.

    products: of one weight with the value, or of each expert. readers: by that one, all weights that have its
    statistics.
    """

    products: Products
    readers: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights, in order."""
        return tuple(name for names in self.readers.values() for name in names)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the model between two cut points of the residual stream, and the stages in it.

    start, end: the values of the cut points; start is None before the first, end after the last. No weight is
    multiplied in two sections.
    """

    start: ir.Var | None
    end: ir.Var | None
    stages: tuple[Stage, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that are quantized here, each once, in the order of their last products."""
        return tuple(reversed(dict.fromkeys(name for stage in reversed(self.stages) for name in reversed(stage.names))))

    def output(self, graph: Graph) -> ir.Var:
        """Returns what the section puts out: its end, or the logits."""
        output = self.end if self.end is not None else graph.jaxpr.outvars[0]
        assert isinstance(output, ir.Var)
        return output


def find_sections(graph: Graph, names: Sequence[str]) -> list[Section]:
    """Returns the sections with products of weights among `names` that can be quantized, in the model's order.

    A weight that is multiplied in several joins them, with all between, to one.
    """
    order = _order(graph)
    cuts = cut_points(graph)
    stages = [(_place(stage, order, cuts), stage) for stage in _stages(find_products(graph, names), order)]
    last = {name: place for place, stage in stages for name in stage.names}
    groups: list[tuple[int, list[Stage]]] = []
    reach = -2
    for place, stage in stages:
        if place > reach:
            groups.append((place, []))
        groups[-1][1].append(stage)
        reach = max(reach, place, *(last[name] for name in stage.names))
    starts = [cuts[place] if place >= 0 else None for place, _ in groups]
    ends = [*starts[1:], None]
    return [Section(s, e, tuple(own)) for s, e, (_, own) in zip(starts, ends, groups, strict=True)]


def _stages(products: Products, order: Mapping[ir.Var, int]) -> list[Stage]:
    """Returns what is observed at once, in the order in which the model makes the values."""
    ways: dict[tuple[ir.Var, tuple[int, ...]], dict[str, None]] = {}
    for name, inputs in products.plain.items():
        for way in inputs:
            ways.setdefault(way, {})[name] = None
    stages = []
    for way, names in ways.items():
        first = next(iter(names))
        stages.append(Stage(Products({first: [way]}), {first: tuple(names)}))
    for group in products.experts:
        stages.append(Stage(Products({}, [group]), {name: (name,) for name in group.names}))
    return sorted(stages, key=lambda stage: max(order.get(var, -1) for var in stage.products.values))


def _place(stage: Stage, order: Mapping[ir.Var, int], cuts: Sequence[ir.Var]) -> int:
    """Returns the number of the last cut point that a stage comes after, or is; -1: none."""
    first = min(order.get(var, -1) for var in stage.products.values)
    return max((i for i, cut in enumerate(cuts) if order.get(cut, -1) <= first), default=-1)


def _order(graph: Graph) -> dict[ir.Var, int]:
    return {out: i for i, eqn in enumerate(graph.jaxpr.eqns) for out in eqn.outvars}
