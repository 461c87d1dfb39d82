"""A graph back into a checkpoint of its family, so that other tools read what passes made of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from xlathe import jaxpr as ir
from xlathe.card import Card
from xlathe.errors import CheckpointError
from xlathe.graph import Graph
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.family import Family, find_family
from xlathe.models.naming import is_turned, their_name
from xlathe.models.packed_export import Quantized, lay_out, quantized_weights
from xlathe.models.pretrained import weight_shapes
from xlathe.models.resize import Change, Shapes, drop_layers, head_channels
from xlathe.models.settings import Settings
from xlathe.storage import Blocks, parse_format

GRAPH = "the graph"


def to_checkpoint(graph: Graph, layout: str | None = None) -> Checkpoint:
    """Returns a graph's weights under Hugging Face's names, each made when it is read, and a card that fits them.

    The graph may have been pruned where the family's configuration can say so: every layer alike, whole heads and
    neurons, features of the stream, whole layers. layout: how quantized weights lie in the files, a name in
    `formats.layouts.table.LAYOUTS`.
    Raises CheckpointError where it cannot, for quantized weights without a layout, or of a scheme that the layout does
    not hold, and for a graph that is not of a known family; OptionError for an unknown layout.
    """
    if graph.card is None:
        raise CheckpointError(f"{GRAPH} has no card: only graphs of pretrained models go back into a checkpoint")
    settings = Settings(graph.card.config, GRAPH)
    family = find_family(graph.card.config, settings.where)
    weights = {} if layout is None else quantized_weights(graph)
    held = {name for weight in weights.values() for name in weight.inputs}
    plain = {name: tuple(map(int, graph.aval(name).shape)) for name in graph.names("weight") if name not in held}
    shapes = plain | {name: (weight.k, weight.n) for name, weight in weights.items()}
    _check_names(family, shapes)
    _check_heads(graph, family, settings)
    if layout is not None:
        _check_linear(family, layout, weights)
    kept = sorted({int(name.split("/")[1]) for name in shapes if name.startswith("layers/")})
    experts = _experts(shapes)
    ours = {_renumber(name, kept, experts): name for name in shapes}
    renamed = {new: shapes[old] for new, old in ours.items()}
    config = _resized(family, settings, renamed, kept)
    _check_shapes(family, config, renamed, graph.max_len)
    theirs = {old: their_name(family, new) for new, old in ours.items()}
    changes = {ours[new]: change for new, change in family.adapt(renamed, settings).items()}
    tensors = {theirs[old]: _tensor(graph, old, is_turned(family, old), changes.get(old)) for old in plain}
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    said: dict[str, Any] = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    if layout is not None:
        linear = [*(theirs[name] for name in plain if is_turned(family, name)), *_tied_head(family, shapes)]
        packed, quantization = lay_out(layout, {theirs[name]: weight for name, weight in weights.items()}, linear)
        tensors |= packed
        said["quantization_config"] = quantization
    card = Card({**config, **said}, graph.card.generation, graph.card.chat_template)
    return Checkpoint(card, tensors, GRAPH, graph.tokenizer)


def source_names(graph: Graph) -> dict[str, str]:
    """Returns our name of each weight by Hugging Face's, of a graph that `to_checkpoint` takes."""
    checkpoint = to_checkpoint(graph)
    return dict(zip(checkpoint.tensors, graph.names("weight"), strict=True))


def _tied_head(family: Family, shapes: Shapes) -> list[str]:
    """Returns the name of a head that files do not have: it is the embedding, and a linear module all the same."""
    tied = "head/kernel" in family.names and "head/kernel" not in shapes
    return [their_name(family, "head/kernel")] if tied else []


def _check_linear(family: Family, layout: str, weights: Mapping[str, Quantized]) -> None:
    """Layouts are of linear modules, [outputs, inputs]."""
    if not weights:
        raise CheckpointError(f"layout={layout}: expected quantized weights, and the graph has none")
    for name, weight in weights.items():
        if isinstance(parse_format(weight.packed.format), Blocks):
            raise CheckpointError(
                f"{name} is {weight.packed.scheme}: {layout} holds no blocks of GGUF; from_pretrained(..., "
                "packed=False) reads floats of a GGUF file, which another scheme quantizes"
            )
        if not is_turned(family, name):
            raise CheckpointError(
                f"{name} is {weight.packed.scheme}, and {layout} holds linear layers alone; a rule "
                f"({name!r}, 'none') leaves it as it is"
            )


def _check_names(family: Family, shapes: Shapes) -> None:
    for name in shapes:
        pattern = "/".join("*" if part.isdigit() else part for part in name.split("/"))
        if pattern not in family.names:
            raise CheckpointError(
                f"{name} is no weight of a {family.architecture}: a checkpoint holds weights as they were trained, so "
                "it is made before they are folded; layout= says how quantized ones are written"
            )


def _check_heads(graph: Graph, family: Family, settings: Settings) -> None:
    """Heads have the channels that they were trained with: sizes of weights may be those of fewer such heads."""
    expected = head_channels(settings)
    for eqn in graph.jaxpr.eqns:
        if ir.is_op(eqn, "attention"):
            found = tuple(int(value.aval.shape[-1]) for value in eqn.invars[1:3])
            if found != expected:
                raise CheckpointError(
                    f"heads have {found[0]} channels of keys and {found[1]} of values, trained with {expected[0]} and "
                    f"{expected[1]}: no config.json of a {family.architecture} says which are left; Graph.save keeps it"
                )


def _experts(shapes: Shapes) -> dict[str, list[int]]:
    """Returns the experts that are left in each layer, by the start of their names."""
    found: dict[str, set[int]] = {}
    for name in shapes:
        before, among, after = name.partition("/experts/")
        if among:
            found.setdefault(before, set()).add(int(after.split("/")[0]))
    return {before: sorted(numbers) for before, numbers in found.items()}


def _renumber(name: str, layers: list[int], experts: dict[str, list[int]]) -> str:
    before, among, after = name.partition("/experts/")
    if among:
        number, *rest = after.split("/")
        after = "/".join([str(experts[before].index(int(number))), *rest])
    parts = before.split("/")
    if parts[0] == "layers":
        parts[1] = str(layers.index(int(parts[1])))
    return "/".join(parts) + among + after


def _resized(family: Family, settings: Settings, shapes: Shapes, kept: list[int]) -> dict[str, Any]:
    """Returns the configuration with what differs changed, and nothing else."""
    module = _shapes(family, settings.values)
    if {name: shapes.get(name) for name in module} == module and len(module) == len(shapes):
        return dict(settings.values)
    return {**settings.values, **family.resize(shapes, settings), **drop_layers(settings, kept, family.indexed)}


def _shapes(family: Family, config: Mapping[str, Any], length: int = 1) -> dict[str, tuple[int, ...]]:
    settings = Settings(config, GRAPH)
    return weight_shapes(nnx.eval_shape(lambda: family.build(settings, length, nnx.Rngs(0))))


def _check_shapes(family: Family, config: Mapping[str, Any], shapes: Shapes, length: int) -> None:
    expected = _shapes(family, config, length)
    for name in dict.fromkeys([*expected, *shapes]):
        if expected.get(name) != shapes.get(name):
            found, said = (list(s[name]) if name in s else "nothing" for s in (shapes, expected))
            raise CheckpointError(
                f"{name} is {found}, and the closest config.json of a {family.architecture} says {said}: it cannot "
                "describe this graph (every layer alike, whole heads); Graph.save keeps it"
            )


def _tensor(graph: Graph, name: str, turned: bool, change: Change | None) -> Tensor:
    aval = graph.aval(name)
    shape = tuple(map(int, aval.shape))

    def read() -> np.ndarray:
        array = np.asarray(graph.weights[name])
        array = array if change is None else change(array)
        return array.T if turned else array

    return Tensor(shape[::-1] if turned else shape, np.dtype(aval.dtype), read)
