"""A merge as YAML: mergekit's keys, read strictly. https://github.com/arcee-ai/mergekit has what they mean."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xlathe.errors import OptionError, did_you_mean
from xlathe.passes.merge.methods import METHODS, Method
from xlathe.passes.merge.vocabulary import Row, Vocabulary

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
TOP = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source"),
    *("name", "tokenizer"),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One value of a parameter: for names that hold `filter`, None: all; a gradient over layers, or a single value."""

    filter: str | None
    values: tuple[Any, ...]

    def at(self, place: float) -> Any:
        """Returns the value at a place from 0, a slice's first layer, to 1: between numbers on a line, else a step."""
        if len(self.values) == 1:
            return self.values[0]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values):
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        return float(np.interp(place * (len(self.values) - 1), np.arange(len(self.values)), self.values))


Parameters = Mapping[str, tuple[Choice, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, `base+adapter` with an adapter folded into it, and the layers of it that are taken, from the first to
    before the last; None: all."""

    model: str
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers of several models that become the same layers of the result."""

    sources: tuple[Source, ...]
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class Recipe:
    """out_dtype: of what is written, None: as the base has it, or the first model. vocabulary: None: all have the same.
    """

    method: str
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters
    out_dtype: str | None
    where: str
    vocabulary: Vocabulary | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """All models, the base first."""
        named = [source.model for each in self.slices for source in each.sources]
        return tuple(dict.fromkeys([*([self.base] if self.base else []), *named]))


def read_recipe(path: Path) -> Recipe:
    """Reads a file. Raises OptionError, naming the key, for what is unknown, missing or of a wrong type."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} is no recipe: {' '.join(str(error).split())}") from None
    return parse_recipe(found, str(path))


def parse_recipe(found: Any, where: str) -> Recipe:
    """Reads what YAML holds."""
    top = _object(found, where, TOP)
    name = top.get("merge_method")
    if not isinstance(name, str) or name not in METHODS:
        raise OptionError(f"{where}: merge_method: no method {name!r}{did_you_mean(str(name), METHODS)}")
    if ("models" in top) == ("slices" in top):
        raise OptionError(f"{where}: expected either models or slices")
    method, base = METHODS[name], top.get("base_model")
    if base is not None and not isinstance(base, str):
        raise OptionError(f"{where}: base_model: expected a model, found {base!r}")
    slices = _slices(top, where, method)
    recipe = Recipe(
        name, base, slices, _parameters(top, where, method), _dtype(top, where), where, _vocabulary(top, where)
    )
    _check_models(recipe, method)
    return recipe


def _slices(top: Mapping[str, Any], where: str, method: Method) -> tuple[Slice, ...]:
    if "models" in top:
        sources = [_source(each, f"{where}: models[{i}]", method, layers=False)
                   for i, each in enumerate(_list(top["models"], f"{where}: models"))]  # fmt: skip
        return (Slice(tuple(sources), {}),)
    return tuple(
        _slice(each, f"{where}: slices[{i}]", method) for i, each in enumerate(_list(top["slices"], f"{where}: slices"))
    )


def _slice(found: Any, where: str, method: Method) -> Slice:
    each = _object(found, where, ("sources", "parameters"))
    sources = [
        _source(source, f"{where}: sources[{i}]", method, layers=True)
        for i, source in enumerate(_list(each.get("sources"), f"{where}: sources"))
    ]
    lengths = {last - first for first, last in (s.layers for s in sources if s.layers is not None)}
    if len(lengths) != 1:
        raise OptionError(f"{where}: expected as many layers of each model, found {sorted(lengths)}")
    return Slice(tuple(sources), _parameters(each, where, method))


def _source(found: Any, where: str, method: Method, *, layers: bool) -> Source:
    each = _object(found, where, ("model", "lora", "parameters", *(["layer_range"] if layers else [])))
    model, taken = each.get("model"), each.get("layer_range")
    if not isinstance(model, str):
        raise OptionError(f"{where}: model: expected a directory, a file or a name, found {model!r}")
    range_, lora = _layers(taken, where) if layers else None, each.get("lora")
    if not isinstance(lora, str | None):
        raise OptionError(f"{where}: lora: expected an adapter's directory or name, found {lora!r}")
    return Source(model if lora is None else f"{model}+{lora}", range_, _parameters(each, where, method))


def _layers(found: Any, where: str) -> tuple[int, int]:
    whole = isinstance(found, list) and len(found) == 2 and all(type(n) is int for n in found)
    if not whole or not 0 <= found[0] < found[1]:
        raise OptionError(f"{where}: layer_range: expected [first, after the last], found {found!r}")
    return found[0], found[1]


def _parameters(found: Mapping[str, Any], where: str, method: Method) -> Parameters:
    known = [*method.each, *method.shared]
    values = _object(found.get("parameters") or {}, f"{where}: parameters", known)
    return {name: _choices(value, f"{where}: parameters: {name}") for name, value in values.items()}


def _choices(value: Any, where: str) -> tuple[Choice, ...]:
    listed = value if isinstance(value, list) and any(isinstance(item, dict) for item in value) else [value]
    if isinstance(value, dict):
        raise OptionError(f"{where}: expected a list of filters and values, found one that is in no list")
    found = []
    for item in listed:
        if isinstance(item, dict):
            item = _object(item, where, ("filter", "value"))
            chosen = item.get("filter")
            if not isinstance(chosen, str | None) or "value" not in item:
                raise OptionError(f"{where}: expected a value, and maybe a filter, found {item!r}")
            found.append(Choice(None if chosen == "*" else chosen, _values(item["value"], where)))
        else:
            found.append(Choice(None, _values(item, where)))
    return tuple(found)


def _values(value: Any, where: str) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values or not all(isinstance(item, bool | int | float | str) for item in values):
        raise OptionError(f"{where}: expected a value or a list of them, found {value!r}")
    return values


def _dtype(top: Mapping[str, Any], where: str) -> str | None:
    for key in ("out_dtype", "dtype"):
        if top.get(key) is not None:
            if not isinstance(top[key], str) or top[key] not in DTYPES:
                raise OptionError(f"{where}: {key}: no dtype {top[key]!r}{did_you_mean(str(top[key]), DTYPES)}")
            return str(top[key])
    return None


def _vocabulary(top: Mapping[str, Any], where: str) -> Vocabulary | None:
    if "tokenizer" in top and "tokenizer_source" in top:
        raise OptionError(f"{where}: expected either tokenizer or tokenizer_source")
    if top.get("tokenizer_source") is not None:
        return _vocabulary_of({"source": top["tokenizer_source"]}, where)
    return None if top.get("tokenizer") is None else _vocabulary_of(top["tokenizer"], f"{where}: tokenizer")


def _vocabulary_of(found: Any, where: str) -> Vocabulary:
    each = _object(found, where, ("source", "tokens", "pad_to_multiple_of"))
    source, multiple = each.get("source", "base"), each.get("pad_to_multiple_of") or 1
    if not isinstance(source, str):
        raise OptionError(f"{where}: source: expected union, base or a model, found {source!r}")
    if type(multiple) is not int or multiple < 1:
        raise OptionError(f"{where}: pad_to_multiple_of: expected a whole number of at least 1, found {multiple!r}")
    tokens = _object_of_any(each.get("tokens") or {}, f"{where}: tokens")
    rows = {token: _row(token, row, f"{where}: {token!r}") for token, row in tokens.items()}
    return Vocabulary(source, rows, multiple)


def _row(text: str, found: Any, where: str) -> Row:
    """A token's row is another model's, of the same token or of another one, or zeros."""
    each = _object(found, where, ("source", "force"))
    source, force = each.get("source"), each.get("force", False)
    if not isinstance(force, bool):
        raise OptionError(f"{where}: force: expected true or false, found {force!r}")
    if isinstance(source, str):
        return Row(source, text, force)
    given = _object(source, f"{where}: source", ("kind", "model", "token", "token_id"))
    kind, model, token = given.get("kind"), given.get("model"), given.get("token", given.get("token_id"))
    if kind == "zero" and given.keys() == {"kind"}:
        return Row(None, None, force)
    named = isinstance(token, str) if "token" in given else type(token) is int and token >= 0
    if kind != "model_token" or not isinstance(model, str) or not named or len(given) != 3:
        raise OptionError(
            f"{where}: source: expected a model, kind zero, or kind model_token with a model and its token or "
            f"token_id, found {source!r}"
        )
    return Row(model, token, force)


def _check_models(recipe: Recipe, method: Method) -> None:
    if method.base == "needed" and recipe.base is None:
        raise OptionError(f"{recipe.where}: {recipe.method} needs a base_model")
    fewest, most = method.count
    for each in recipe.slices:
        others = [s for s in each.sources if method.base == "none" or s.model != recipe.base]
        if not fewest <= len(others) <= most:
            wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
            beside = "" if method.base == "none" else " beside the base"
            raise OptionError(f"{recipe.where}: {recipe.method} takes {wanted} models{beside}, found {len(others)}")


def _object_of_any(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise OptionError(f"{where}: expected an object, found {found!r}")
    return found


def _object(found: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise OptionError(f"{where}: expected an object, found {found!r}")
    for key in found:
        if key not in known:
            raise OptionError(f"{where}: no key {key!r}{did_you_mean(str(key), known)}")
    return found


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise OptionError(f"{where}: expected a list, found {found!r}")
    return found
