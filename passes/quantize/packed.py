"""Weights that arrive quantized: a graph multiplies with what its file holds, and nothing is rounded anew."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xlathe.graph import Graph, Origin, Record
from xlathe.passes.quantize.experts import find_experts
from xlathe.passes.quantize.products import Replaced, replace_products
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Layout, Uses, plan_weights
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import parse_format

ROWS = Layout((0,), (1,))
"""Of a matrix whose rows are outputs."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A graph whose products are with packed weights. tensors: what its new inputs are, for the caller to add to the
    graph's weights; origins: which trained weights they stand for; record: what was kept, and why the rest was not."""

    graph: Graph
    tensors: Mapping[str, Tensor]
    origins: tuple[Origin, ...]
    record: Record


def keep_packed(graph: Graph, packed: Mapping[str, Packed], notes: tuple[str, ...] = ()) -> Kept:
    """Replaces weights by what their files hold, wherever they are multiplied with activations or rows looked up.

    packed: by the weight's name. One that is used otherwise, or over other axes than its file packs, stays a weight of
    floats. notes: more that the report should say.
    """
    wanted = {name: Scheme(parse_format(matrix.format), matrix.activations) for name, matrix in packed.items()}
    layouts, misses = plan_weights(graph, list(wanted))
    groups, refused = find_experts(graph, wanted)
    layouts |= {name: group.layout for group in groups for name in group.names}
    uses = Uses(graph)
    layouts |= {name: ROWS for name in wanted if name not in layouts and uses.is_looked_up(name)}
    fitting = {n: layout for n, layout in layouts.items() if _fits(graph, n, packed[n], wanted[n], layout)}
    whole = [group for group in groups if all(name in fitting for name in group.names)]
    torn = {name for group in groups if group not in whole for name in group.names}
    chosen = {name: (wanted[name], layout) for name, layout in fitting.items() if name not in torn}
    result, replaced = replace_products(graph, chosen, whole)
    tensors = {part: tensor for each in replaced for part, tensor in _tensors(each, packed).items()}
    shapes = {name: tuple(map(int, graph.aval(name).shape)) for name in chosen}
    origins = tuple(Origin(name, shapes[name], each.parts) for each in replaced for name in each.weights)
    others = tuple(_told(name, wanted[name], name in layouts) for name in packed if name not in fitting)
    record = Record("packed", {"weight": len(chosen)}, (*misses, *refused, *others), notes)
    return Kept(result, tensors, origins, record)


def _fits(graph: Graph, name: str, packed: Packed, scheme: Scheme, layout: Layout) -> bool:
    parts = scheme.parts(*layout.shape(graph.aval(name)))
    return [tensor.shape for tensor in packed.parts.values()] == [part.shape for part in parts.values()]


def _told(name: str, scheme: Scheme, used: bool) -> str:
    """Says why a packed weight is floats."""
    if used:
        return f"{name} is packed in parts of other shapes than {scheme} has over the axis that a product sums over"
    return f"{name} is packed, and no product sums over its rows"


def _tensors(replaced: Replaced, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    lines = [[packed[name].parts[part.rpartition(".")[2]] for name in replaced.weights] for part in replaced.parts]
    made = [_stacked(line) if replaced.stacked else line[0] for line in lines]
    return dict(zip(replaced.parts, made, strict=True))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Returns one array [experts, ...], read expert by expert."""
    shape, dtype = tensors[0].shape, tensors[0].dtype

    def read() -> np.ndarray:
        out = np.empty((len(tensors), *shape), dtype)
        for i, tensor in enumerate(tensors):
            out[i] = tensor.read()
        return out

    return Tensor((len(tensors), *shape), dtype, read)
