"""Floating point operations a token, with and without those on weights that are zero: counted, not measured."""

import math
from collections.abc import Mapping, Sequence

from xlathe import jaxpr as ir
from xlathe.graph import Graph
from xlathe.passes.prune.cost import SUMS
from xlathe.passes.quantize.experts import Experts
from xlathe.passes.quantize.uses import Uses


def count_flops(graph: Graph, zeros: Mapping[str, float], experts: Sequence[Experts]) -> tuple[int, int] | None:
    """Returns the operations of a graph's products for a token without others to attend to, and how many are left
    without those on zeros. Products with weights that are quantized already are left out. None where the graph is for
    fixed numbers of texts or tokens: what is done for each token cannot be told from what is done once.

    zeros: the fraction of a weight that is zero, by name; experts: those among them that are multiplied at once.
    """
    if not all(map(ir.is_symbolic, graph.aval("tokens").shape)):
        return None
    finder, stacked = Uses(graph), {name: group for group in experts for name in group.names}
    products = [eqn for eqn in ir.live_equations(graph.jaxpr) if eqn.primitive.name in SUMS]
    whole = sum(_flops(eqn) for eqn in products if any(map(ir.is_symbolic, eqn.outvars[0].aval.shape)))
    saved = 0.0
    for name, fraction in zeros.items():
        if name in stacked:  # a token goes to some of them: each has its share of the product of all
            group = stacked[name]
            saved += fraction * _flops(group.eqn) / len(group.names)
        else:
            saved += sum(fraction * _flops(use.eqn) for use in finder.of(name)[1] if use.is_product)
    return whole, whole - round(saved)


def _flops(eqn: ir.JaxprEqn) -> int:
    left = eqn.invars[0].aval
    summed = math.prod(_one(left.shape[axis]) for axis in SUMS[eqn.primitive.name](eqn))
    return 2 * summed * math.prod(map(_one, eqn.outvars[0].aval.shape))


def _one(size: ir.Dim) -> int:
    """Returns a size of one token of one text."""
    return int(ir.substitute(size, dict.fromkeys(ir.dim_vars(size), 1)))
