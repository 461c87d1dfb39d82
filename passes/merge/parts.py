"""Which tensors a merge has, and of which each is made: layers may be taken from several models and stacked anew."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xlathe.errors import CheckpointError, OptionError
from xlathe.models.checkpoint import Checkpoint
from xlathe.passes.merge.recipe import Recipe, Slice, Source

LAYER = re.compile(r"(?<![^.])(\d+)(?![^.])")
"""A layer's number in the name of a tensor: the first part that is a number; an expert's is a later one."""
_FIRST = re.compile(r"embed(?!_out)|wte|wpe|embd", re.IGNORECASE)
"""Tensors without a number that come before the layers; others come after them."""
COUNTS = ("num_hidden_layers", "n_layer")
PER_LAYER = ("layer_types", "mlp_only_layers", "no_rope_layers")
"""Settings with one entry a layer, which slices would have to rewrite."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one tensor of the result comes from.

    sources: of each model its tensor's name there; place: of the layer in its slice, 0 to 1; 0 before and 1 after all
    layers.
    """

    name: str
    slice: Slice
    sources: tuple[tuple[Source, str], ...]
    place: float


def check_layers(recipe: Recipe, each: Slice, opened: Mapping[str, Checkpoint]) -> None:
    """Raises OptionError where a slice takes layers that a model does not have, CheckpointError where one of its models
    has other tensors outside of layers than the recipe's first, or layers of other tensors, naming the first."""
    first = recipe.models[0]
    found = {model: _tensors_of(opened[model]) for model in {first, *(source.model for source in each.sources)}}
    outside, kinds = found[first]
    for source in each.sources:
        own, layers = found[source.model]
        for name in sorted(outside ^ own):
            lacks, has = (source.model, first) if name in outside else (first, source.model)
            raise CheckpointError(f"{lacks} has no tensor {name!r}, which {has} has")
        if source.layers is None:
            continue
        start, end = source.layers
        if end > len(layers):
            raise OptionError(
                f"{recipe.where}: layer_range {list(source.layers)} of {source.model}, which has {len(layers)} layers"
            )
        beside = found[each.sources[0].model][1][each.sources[0].layers[0] :]  # type: ignore[index]
        for i in range(start, end):
            like = beside[i - start] if layers[i] in kinds else kinds[min(i, len(kinds) - 1)]
            for name in sorted(layers[i] ^ like):
                raise CheckpointError(f"layer {i} of {source.model} and a layer of {first} differ: one has no {name!r}")


def _tensors_of(checkpoint: Checkpoint) -> tuple[frozenset[str], list[frozenset[str]]]:
    """Returns the names outside of layers, and those of each layer with * in the place of its number."""
    outside, layers = set[str](), [set[str]() for _ in range(_layer_count(checkpoint))]
    for name in checkpoint.tensors:
        match = LAYER.search(name)
        if match is None:
            outside.add(name)
        else:
            layers[int(match[1])].add(f"{name[: match.start()]}*{name[match.end() :]}")
    return frozenset(outside), list(map(frozenset, layers))


def find_parts(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Iterator[Part]:
    """Yields the result's tensors: those before the layers, the layers of each slice in order, those after them."""
    names = list(opened[recipe.slices[0].sources[0].model].tensors)
    outside = [name for name in names if LAYER.search(name) is None]
    for name in (name for name in outside if _FIRST.search(name)):
        yield _whole(recipe.slices[0], name, 0.0)
    offset = 0
    for each in recipe.slices:
        count = _count(each, opened)
        for i in range(count):
            place = i / (count - 1) if count > 1 else 0.0
            yield from _layer(each, opened, i, offset + i, place)
        offset += count
    for name in (name for name in outside if not _FIRST.search(name)):
        yield _whole(recipe.slices[-1], name, 1.0)


def _whole(each: Slice, name: str, place: float) -> Part:
    return Part(name, each, tuple((source, name) for source in each.sources), place)


def _count(each: Slice, opened: Mapping[str, Checkpoint]) -> int:
    source = each.sources[0]
    return _layer_count(opened[source.model]) if source.layers is None else source.layers[1] - source.layers[0]


def _layer_count(checkpoint: Checkpoint) -> int:
    found = (LAYER.search(name) for name in checkpoint.tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _layer(each: Slice, opened: Mapping[str, Checkpoint], i: int, to: int, place: float) -> Iterator[Part]:
    starts = [source.layers[0] if source.layers else 0 for source in each.sources]
    for name in opened[each.sources[0].model].tensors:
        match = LAYER.search(name)
        if match is not None and int(match[1]) == starts[0] + i:
            head, tail = name[: match.start()], name[match.end() :]
            from_ = tuple((s, f"{head}{start + i}{tail}") for s, start in zip(each.sources, starts, strict=True))
            yield Part(f"{head}{to}{tail}", each, from_, place)


def layer_counts(recipe: Recipe, first: Checkpoint) -> dict[str, Any]:
    """Returns the settings that count layers, where slices change their number."""
    if recipe.slices[0].sources[0].layers is None:
        return {}
    config = first.card.config
    for key in PER_LAYER:
        if config.get(key):
            raise OptionError(f"{recipe.where}: slices of a model whose config has {key} are not supported")
    count = sum(s.sources[0].layers[1] - s.sources[0].layers[0] for s in recipe.slices if s.sources[0].layers)
    return {key: count for key in COUNTS if key in config}
