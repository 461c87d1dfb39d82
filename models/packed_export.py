"""The quantized weights of a graph, under the names of its checkpoint and in the layout of other tools."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xlathe import jaxpr as ir
from xlathe.errors import CheckpointError
from xlathe.graph import Graph
from xlathe.prepared import Prepared
from xlathe.safetensors_file import Packed, Tensor

OPERANDS = {"quantized_dot": 1, "quantized_ragged_dot": 2}  # before the parts of the weight
WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [n, k] that a graph multiplies with quantized. inputs: of the graph, which hold its parts."""

    packed: Packed
    n: int
    k: int
    inputs: tuple[str, ...]


def quantized_weights(graph: Graph) -> dict[str, Quantized]:
    """Returns the quantized weights of a graph by their names, each part made when it is read; experts are apart."""
    names = {var: item.name for var, item in zip(graph.jaxpr.invars, graph.inputs, strict=True)}
    found, parts = {}, Prepared(graph, "weight")
    for eqn, before in _products(graph):
        inputs = tuple(names[var] for var in eqn.invars[before:] if isinstance(var, ir.Var) and var in names)
        given, (n, k) = ir.attributes(eqn), (int(eqn.outvars[0].aval.shape[-1]), int(eqn.invars[0].aval.shape[-1]))
        stacked = before > 1
        for i, name in enumerate(_weights(graph, inputs[0], stacked)):
            tensors = {each.rpartition(".")[2]: parts.tensor(each, i if stacked else None) for each in inputs}
            found[name] = Quantized(Packed(given["format"], tensors, given.get("activations")), n, k, inputs)
    return found


def _products(graph: Graph) -> Iterator[tuple[ir.JaxprEqn, int]]:
    for eqn in ir.live_equations(graph.jaxpr):
        for name, before in OPERANDS.items():
            if ir.is_op(eqn, name):
                yield eqn, before


def _weights(graph: Graph, part: str, stacked: bool) -> list[str]:
    """Returns the names of the weights that a part is of."""
    stem = part.rpartition(".")[0]
    count = int(graph.aval(part).shape[0])
    return [stem.replace("*", str(i)) for i in range(count)] if stacked else [stem]


def lay_out(
    layout: str, weights: Mapping[str, Quantized], plain: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of quantized weights by their names in files, and `quantization_config`.

    weights: by their names in files; plain: linear weights of floats. Raises CheckpointError, naming the weight and the
    layouts that can hold it, for a scheme that the layout cannot; OptionError for an unknown layout.
    """
    from xlathe.models.formats.layouts.table import find_layout

    chosen = find_layout(layout)
    tensors: dict[str, Tensor] = {}
    packed = {name.removesuffix(WEIGHT): weight.packed for name, weight in weights.items()}
    for module, weight in zip(packed, weights.values(), strict=True):
        if reason := chosen.refusal(module, weight.packed, weight.n, weight.k):
            raise CheckpointError(
                f"{module}{WEIGHT} is {weight.packed.scheme}, which {layout} does not hold: {reason}; "
                f"{_others(module, weight)}"
            )
        made = chosen.tensors(module, weight.packed, weight.n, weight.k)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in made.items()}
    return tensors, chosen.settings(packed, [name.removesuffix(WEIGHT) for name in plain])


def _others(module: str, weight: Quantized) -> str:
    from xlathe.models.formats.layouts.table import LAYOUTS

    able = [name for name, each in LAYOUTS.items() if not each.refusal(module, weight.packed, weight.n, weight.k)]
    return f"layouts that do: {', '.join(able)}" if able else "no layout does"
