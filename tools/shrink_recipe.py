"""What `xlathe shrink` does to a model, round after round: a preset of `xlathe.configs.shrink`, or a JSON file."""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from xlathe.errors import OptionError, did_you_mean
from xlathe.tools.source import parse_passes
from xlathe.tools.text import read_text

if TYPE_CHECKING:
    from xlathe.passes import PruneStructured


@final
@dataclasses.dataclass(frozen=True)
class Recipe:
    """rounds: a `prune_structured{...}` each, after which the student learns from the whole model.

    quantize: passes on what is left; tokens: of training a round; loss, learning_rate, rows, context: as the flags of
    `xlathe distill`. Raises OptionError for values that these do not take.
    """

    rounds: tuple[str, ...]
    tokens: int
    quantize: str
    loss: str = "forward_kl"
    learning_rate: float = 4e-3
    rows: int = 4
    context: int = 512

    def __post_init__(self) -> None:
        if not self.rounds:
            raise OptionError("shrink: rounds is empty, expected a prune_structured{...} for each")
        if not isinstance(self.context, int) or self.context < 2:
            raise OptionError(f"shrink: context={self.context!r}: expected the tokens of a row, 2 or more")
        parse_passes(self.quantize)
        for number in range(len(self.rounds)):
            self.prune(number)

    def prune(self, number: int) -> "PruneStructured":
        """Returns the pass of a round."""
        from xlathe.passes import PruneStructured

        passes = parse_passes(self.rounds[number]).passes
        if len(passes) != 1 or not isinstance(passes[0], PruneStructured):
            raise OptionError(
                f"shrink: round {number + 1}: expected prune_structured{{...}}, got {self.rounds[number]!r}"
            )
        return passes[0]


def find_recipe(name: str) -> Recipe:
    """Returns the recipe of a preset, or in a JSON file; OptionError for unknown names and keys."""
    from xlathe.configs import shrink

    known = [module.name for module in pkgutil.iter_modules(shrink.__path__)]
    if name in known:
        return read_recipe(dict(importlib.import_module(f"xlathe.configs.shrink.{name}").get_config()), name)
    if not name.endswith(".json"):
        raise OptionError(f"no recipe {name!r}{did_you_mean(name, known)}; a file of one ends in .json")
    try:
        content = json.loads(read_text(Path(name), "config"))
    except ValueError as error:
        raise OptionError(f"{name} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise OptionError(f"{name}: expected an object, got {type(content).__name__}")
    return read_recipe(content, name)


def read_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for key, value in content.items():
        if key not in fields:
            raise OptionError(f"{where}: no key {key!r}{did_you_mean(key, fields)}")
        if key == "rounds":
            right = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        else:
            right = isinstance(value, str if fields[key].type is str else int | float) and not isinstance(value, bool)
        if not right:
            raise OptionError(f"{where}: {key} is not {_name(fields[key].type)}: {value!r}")
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in content:
            raise OptionError(f"{where}: no {field.name}")
    return Recipe(**{**content, "rounds": tuple(content["rounds"])})


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
