"""Choose a scheme for each weight, so that the model fits a budget and its predictions move as little as can be."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from xlathe.errors import OptionError
from xlathe.graph import Graph, Record
from xlathe.passes.quantize.algorithms.knapsack import Item, choose
from xlathe.passes.quantize.methods import find_method
from xlathe.passes.quantize.plan import rules_of
from xlathe.passes.quantize.quantize import Quantize
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.sensitivity import Unit, find_units, measure
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass
from xlathe.report import count_parameters, weight_bytes

SCHEMES = ("int3:g32", "int4:g128", "int4:g32", "int8:channel")


@final
@dataclasses.dataclass(frozen=True)
class Mix:
    """What a budget was spent on. quantize: the pass that does it, whose rules name every weight; schemes: of each.

    size, budget: bytes of all weights, those that stay as they are among them. loss: the sum of the KL divergences,
    nats a token, that the weights cause one by one. bound: no mix within the budget has a smaller sum.
    """

    quantize: Quantize
    schemes: Mapping[str, Scheme]
    size: int
    budget: int
    loss: float
    bound: float


@final
@dataclasses.dataclass(frozen=True)
class Budget(Pass):
    """Quantizes each weight to one of several schemes: the mix of least loss whose weights fit a number of bytes.

    bits: a weight of the model as it was trained, scales and all that stays as it is counted in; or megabytes (10**6
    bytes); one of both. schemes: what a weight may become, as text; `none`: it may also stay as it is. A weight that
    none of them fits stays. method: of rounding, as of `Quantize`.

    What a scheme costs is measured by rounding one weight at a time, `xlathe.passes.quantize.sensitivity`; costs are
    taken to add up, and the knapsack that is left is solved exactly or to a bound that is told
    (`xlathe.passes.quantize.algorithms.knapsack`). Experts that are multiplied at once get one scheme, and so does a
    matrix that is embedding and output layer. What an earlier pass quantized counts and stays.

    Raises OptionError for a budget that is too small, for schemes that round activations, whose error is none of a
    weight's, and without calibration batches.
    """

    keeps: ClassVar[Keeps] = APPROXIMATE

    bits: float | None = None
    megabytes: float | None = None
    schemes: tuple[str, ...] = SCHEMES
    method: str = "search"

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.megabytes) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise OptionError(
                "budget: expected one positive number, of bits a weight or of megabytes, found "
                f"bits={self.bits} and megabytes={self.megabytes}"
            )
        self.parsed_schemes()

    def parsed_schemes(self) -> tuple[Scheme | None, ...]:
        """Returns the schemes; None: as it is."""
        if not self.schemes:
            raise OptionError("budget: schemes: expected at least one")
        schemes = tuple(None if text == "none" else Scheme.parse(text) for text in self.schemes)
        method = find_method(self.method)
        for scheme in schemes:
            if scheme is not None and scheme.activations is not None:
                raise OptionError(f"budget: {scheme} rounds activations too, whose error is none of a weight's; "
                                  f"expected {scheme.stored}")  # fmt: skip
            if scheme is not None and (reason := method.refusal(scheme.stored)):
                raise OptionError(f"budget: method={method} of {scheme}: {reason}")
        return schemes

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        mix = self.choose(graph, context)
        result, record = mix.quantize.apply(graph, context)
        return result, dataclasses.replace(record, notes=(_told(mix, graph), *record.notes))

    def choose(self, graph: Graph, context: Context) -> Mix:
        """Returns the mix. `mix.quantize.plan(graph)` tells schemes and bytes; its text is a pass to use again."""
        units, budget = find_units(graph), self._bytes(graph)
        options = [self._options(unit) for unit in units]
        sizes = [
            np.array([_size(graph, unit, scheme) for scheme in schemes], np.int64)
            for unit, schemes in zip(units, options, strict=True)
        ]
        fixed = weight_bytes(graph) - sum(_size(graph, unit, None) for unit in units)
        least = fixed + sum(int(each.min()) for each in sizes)
        if least > budget:
            raise OptionError(
                f"budget: expected at least {_bytes_text(graph, least)}, what the smallest mix of "
                f"{', '.join(self.schemes)} takes, {fixed:,} of them for what stays as it is; found "
                f"{_bytes_text(graph, budget)}"
            )
        bits = 8 * budget / count_parameters(graph)
        losses = measure(graph, units, options, bits, find_method(self.method), context)
        items = [Item(*each) for each in zip(sizes, losses, strict=True)]
        found = choose(items, budget - fixed)
        chosen = [schemes[pick] for schemes, pick in zip(options, found.picks, strict=True)]
        schemes = {name: s for unit, s in zip(units, chosen, strict=True) if s is not None for name in unit.names}
        quantize = Quantize(rules=rules_of(schemes), method=self.method)
        return Mix(quantize, schemes, fixed + found.size, budget, found.loss, found.bound)

    def _bytes(self, graph: Graph) -> int:
        if self.megabytes is not None:
            return int(self.megabytes * 1e6)
        assert self.bits is not None
        return int(self.bits * count_parameters(graph) / 8)

    def _options(self, unit: Unit) -> list[Scheme | None]:
        """Returns the schemes that fit; a weight that none fits stays as it is."""
        schemes = self.parsed_schemes()
        return [s for s in schemes if s is None or s.stored.misfit(*unit.shape) is None] or [None]


def _size(graph: Graph, unit: Unit, scheme: Scheme | None) -> int:
    """Returns the bytes of a unit's weights."""
    if scheme is None:
        return sum(graph.aval(name).size * graph.aval(name).dtype.itemsize for name in unit.names)
    return len(unit.names) * sum(part.nbytes for part in scheme.parts(*unit.shape).values())


def _told(mix: Mix, graph: Graph) -> str:
    schemes = Counter(map(str, mix.schemes.values()))
    counts = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(schemes.items()))
    proof = "no mix has a smaller one" if mix.bound == mix.loss else f"no mix has one below {mix.bound:.3g}"
    return (
        f"{counts}: {_bytes_text(graph, mix.size)} of {mix.budget:,}; divergences of single weights have the sum "
        f"{mix.loss:.3g} nats a token, and {proof}"
    )


def _bytes_text(graph: Graph, size: int) -> str:
    return f"{size:,} bytes ({8 * size / count_parameters(graph):.3f} bits a weight)"
