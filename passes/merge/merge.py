"""From a recipe to a checkpoint whose tensors are merged as they are read, one at a time.

Nothing but headers and settings is read before the whole merge is known to fit.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import CheckpointError, OptionError, PassError, XlatheError
from xlathe.models.checkpoint import Checkpoint
from xlathe.passes.merge.group import Group, Tensors
from xlathe.passes.merge.methods import METHODS, REQUIRED, Method, check_value
from xlathe.passes.merge.parts import LAYER, Part, check_layers, find_parts, layer_counts
from xlathe.passes.merge.ranks import Band
from xlathe.passes.merge.recipe import Choice, Parameters, Recipe, Source
from xlathe.passes.merge.scope import BLOCK, Change, Kept, blocks, check_shares, find_bands, keep
from xlathe.passes.merge.vocabulary import unite
from xlathe.safetensors_file import Tensor

MEANINGS = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim")
"""Settings without which equal shapes mean other things."""
DEFAULTED = ("hidden_act", "hidden_activation", "activation_function", "num_experts_per_tok")
"""More of them, for which a family has a default: they are compared where both models say them."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one tensor of the result is made of: the base's tensor, the other models', and the method's parameters."""

    part: Part
    base: Tensor | None
    others: tuple[tuple[Source, Tensor], ...]
    each: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]

    @property
    def first(self) -> Tensor:
        return self.base or self.others[0][1]


def merge(recipe: Recipe, opened: Mapping[str, Checkpoint], seed: int = 0) -> Checkpoint:
    """Returns the merged checkpoint; its tensors are merged in float32 when they are read, and rounded at the end.

    opened: every model of the recipe by its name there. seed: of what is drawn by chance; each tensor's draws depend on
    the seed and on its name alone. The settings, the tokenizer and the tied output layer are the base's, or the first
    model's; so are tensors of whole numbers. Raises CheckpointError where models are of other kinds or vocabularies, a
    tensor is missing or two shapes differ, naming the first; OptionError for parameters that are missing or have no
    meaning. A tensor that is read raises CheckpointError, naming it, where the method has no result for it.
    """
    if recipe.vocabulary is not None:
        opened = unite(recipe.vocabulary, recipe.models, opened, recipe.where)
    method, first = METHODS[recipe.method], opened[recipe.models[0]]
    for model in recipe.models[1:]:
        _check_alike(recipe, model, opened)
    for each in recipe.slices:
        check_layers(recipe, each, opened)
    if not 0 <= seed < 1 << 32:
        raise OptionError(f"seed={seed}: expected a whole number of 32 bits, not negative")
    parts = list(find_parts(recipe, opened))
    _check_filters(recipe, [part.name for part in parts])
    works = [_work(part, recipe, method, opened) for part in parts]
    changes = [each for work in works for each in _ranked_together(work)]
    check_shares(changes)
    bands = functools.cache(lambda: find_bands(changes))
    tensors = {work.part.name: _merged(work, recipe, method, bands, seed) for work in works}
    config = dict(first.card.config) | layer_counts(recipe, first)
    if recipe.out_dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": recipe.out_dtype}
    card = dataclasses.replace(first.card, config=config)
    return Checkpoint(card, tensors, recipe.where, first.tokenizer)


def peak_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Returns about the most bytes that are held while a merge is written, mapped files not counted: the largest
    result, and blocks of the tensors that it is read from with their changes, in float32."""
    models, method = max(len(each.sources) for each in recipe.slices), METHODS[recipe.method]
    held = models + (2 if method.base == "none" else 1 + models)
    sizes = [math.prod(tensor.shape) for tensor in checkpoint.tensors.values()]
    results = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    return results + max(4 * held * min(size, BLOCK) for size in sizes)


def _check_filters(recipe: Recipe, names: Sequence[str]) -> None:
    """Raises OptionError for a filter that no tensor's name holds."""
    sources = [source.parameters for each in recipe.slices for source in each.sources]
    for parameters in (recipe.parameters, *(each.parameters for each in recipe.slices), *sources):
        for key, choices in parameters.items():
            for choice in choices:
                if choice.filter is not None and not any(choice.filter in name for name in names):
                    raise OptionError(
                        f"{recipe.where}: {key}: the filter {choice.filter!r} is part of no tensor's name; there are "
                        f"{names[0]}, {names[len(names) // 2]}, ..."
                    )


def _check_alike(recipe: Recipe, model: str, opened: Mapping[str, Checkpoint]) -> None:
    """Compares a model with the first: settings, vocabularies and, where layers are not chosen, tensors."""
    first = recipe.models[0]
    ours, theirs = opened[first], opened[model]
    for key in (*MEANINGS, *DEFAULTED):
        pair = _setting(ours.card.config, key), _setting(theirs.card.config, key)
        if pair[0] != pair[1] and not (key in DEFAULTED and None in pair):
            raise CheckpointError(f"{recipe.where}: {key} is {pair[0]!r} in {first} and {pair[1]!r} in {model}")
    if ours.tokenizer is not None and theirs.tokenizer is not None:
        words = [each.tokenizer.get_vocab() for each in (ours, theirs)]
        if words[0] != words[1]:
            other = min(words[0].items() ^ words[1].items())[0]
            ids, sizes = [each.get(other, "none") for each in words], [len(each) for each in words]
            raise CheckpointError(
                f"{recipe.where}: the vocabularies differ, {sizes[0]} tokens in {first} and {sizes[1]} in {model}, "
                f"first in {other!r}: {ids[0]} and {ids[1]}; tokenizer_source: union, base or a model merges them"
            )
    if recipe.slices[0].sources[0].layers is None:
        for name in [*ours.tensors, *theirs.tensors]:
            for has, lacks in ((first, model), (model, first)):
                if name not in opened[lacks].tensors:
                    raise CheckpointError(f"{lacks} has no tensor {name!r}, which {has} has")


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """Returns a setting, or what leaving it out means: GGUF files say more than many directories do."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if key == "num_key_value_heads":
        return config.get(key) or heads
    if key == "head_dim" and heads and width:
        return config.get(key) or width // heads
    return config.get(key)


def _work(part: Part, recipe: Recipe, method: Method, opened: Mapping[str, Checkpoint]) -> Work:
    found = [(source, _find(opened, source.model, name, part)) for source, name in part.sources]
    base = _base(part, recipe, method, opened)
    others = [pair for pair in found if method.base == "none" or pair[0].model != recipe.base]
    shape = (base or others[0][1]).shape
    for source, tensor in found:
        if tensor.shape != shape:
            raise CheckpointError(
                f"{part.name} is {list(shape)} in {recipe.models[0]} and {list(tensor.shape)} in {source.model}"
                + (": the vocabularies differ" if LAYER.search(part.name) is None and len(shape) == 2 else "")
            )
    each, shared = _values(part, recipe, method, [source for source, _ in others])
    try:
        method.check(each, shared)
    except PassError as error:
        raise OptionError(f"{recipe.where}: {recipe.method} of {part.name}: {error}") from None
    return Work(part, base, tuple(others), each, shared)


def _changes(work: Work) -> list[Change]:
    """Returns a tensor's changes by each model, where ranks say what is kept of them."""
    if "scope" not in work.shared or work.base is None:
        return []
    gammas = work.each.get("gamma", [0] * len(work.others))
    return [
        Change(source.model, work.part.name, tensor, work.base, float(density), float(gamma))
        for (source, tensor), density, gamma in zip(work.others, work.each["density"], gammas, strict=True)
    ]


def _ranked_together(work: Work) -> list[Change]:
    whole = work.shared.get("scope") == "model" and jnp.issubdtype(work.first.dtype, jnp.floating)
    return _changes(work) if whole else []


def _kept(work: Work, bands: Callable[[], Mapping[str, Band]]) -> list[Kept] | None:
    whole = work.shared.get("scope") == "model"
    changes = [(each, (lambda model=each.model: bands()[model]) if whole else None) for each in _changes(work)]
    return [keep(each, work.shared["rescale"], band) for each, band in changes] or None


def _merged(
    work: Work, recipe: Recipe, method: Method, bands: Callable[[], Mapping[str, Band]], seed: int
) -> Tensor:
    name, first = work.part.name, work.first
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return first
    dtype = np.dtype(jnp.dtype(recipe.out_dtype or first.dtype))

    def read() -> np.ndarray:
        result, start = np.empty(math.prod(first.shape), dtype), 0
        try:
            whole = _whole(work, recipe, _kept(work, bands), seed)
            found = None if method.measure is None else method.measure(whole)
            for group in whole.read():
                group = dataclasses.replace(group, found=found)
                with np.errstate(over="ignore"):  # told below
                    merged = np.asarray(method.merge(group)).reshape(-1)
                    result[start : start + merged.size] = merged.astype(dtype)
                if not np.isfinite(merged).all():
                    raise PassError("the result holds NaN or infinite numbers")
                start += merged.size
        except XlatheError as error:
            raise CheckpointError(f"{recipe.method} of {name}: {error}") from None
        if not np.isfinite(result).all():
            raise CheckpointError(f"{recipe.method} of {name}: the result holds numbers that {dtype} does not reach")
        return result.reshape(first.shape)

    return Tensor(first.shape, dtype, read)


def _whole(work: Work, recipe: Recipe, kept: list[Kept] | None, seed: int) -> Tensors:
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(work.part.name.encode()))
    based = [] if work.base is None else [(recipe.base, work.base)]
    tensors = [*based, *((source.model, tensor) for source, tensor in work.others)]

    def read() -> Iterator[Group]:
        start = 0
        for arrays in zip(*(blocks(tensor) for _, tensor in tensors), strict=True):
            for (model, _), array in zip(tensors, arrays, strict=True):
                if not bool(jnp.isfinite(array).all()):
                    raise PassError(f"{model} holds NaN or infinite numbers")
            base, others = (None, arrays) if work.base is None else (arrays[0], arrays[1:])
            yield Group(others, base, work.each, work.shared, key, kept, start)
            start += arrays[0].size

    shape = work.first.shape
    return Tensors(len(work.others), math.prod(shape), work.each, work.shared, len(shape) > 1, read)


def _find(opened: Mapping[str, Checkpoint], model: str, name: str, part: Part) -> Tensor:
    tensors = opened[model].tensors
    if name not in tensors:
        raise CheckpointError(f"{model} has no tensor {name!r}, of which {part.name} is to be made")
    return tensors[name]


def _base(part: Part, recipe: Recipe, method: Method, opened: Mapping[str, Checkpoint]) -> Tensor | None:
    """Returns the base's tensor: as a slice names it, else that of the result's own name."""
    if recipe.base is None or method.base == "none":
        return None
    named = next((name for source, name in part.sources if source.model == recipe.base), None)
    return _find(opened, recipe.base, named or part.sources[0][1], part)


def _values(
    part: Part, recipe: Recipe, method: Method, others: Sequence[Source]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Returns the parameters of one tensor: a source's own before its slice's, and these before the recipe's."""

    def value(name: str, default: Any, own: Parameters) -> Any:
        for parameters in (own, part.slice.parameters, recipe.parameters):
            choice = _first(parameters.get(name, ()), part.name)
            if choice is not None:
                try:
                    return check_value(name, choice.at(part.place))
                except OptionError as error:
                    raise OptionError(f"{recipe.where}: {part.name}: {error}") from None
        if default is REQUIRED:
            raise OptionError(f"{recipe.where}: {recipe.method} needs {name}, and {part.name} has none")
        return check_value(name, default)

    shared: dict[str, Any] = {}
    for name, default in method.shared.items():
        first, *more = [value(name, default, source.parameters) for source in others]
        if any(other != first for other in more):
            given = ", ".join(map(str, (first, *more)))
            raise OptionError(f"{recipe.where}: {part.name}: {name} is one for all models; found {given}")
        shared[name] = first
    each = {
        name: [value(name, default, source.parameters) for source in others] for name, default in method.each.items()
    }
    return each, shared


def _first(choices: Sequence[Choice], name: str) -> Choice | None:
    return next((c for c in choices if c.filter is None or c.filter in name), None)
