"""What a checkpoint says about a model beside its weights; a graph and a bundle carry it along."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from xlathe.errors import OptionError

_DEPTH = 32  # deeper than any settings are nested


@dataclasses.dataclass(frozen=True)
class Card:
    """The settings of a pretrained model, in Hugging Face's vocabulary whatever files it came from.

    config: as `config.json` says (`model_type`, sizes, ...); generation: as `generation_config.json` says
    (`eos_token_id`, ...), empty where there is none; chat_template: the Jinja template that makes a prompt of messages;
    special_tokens: the texts that templates know by name (`bos_token`, `eos_token`, ...), as `tokenizer_config.json`
    says; where it says none, the ids of `generation` and `config` do.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text: `eos_token_id`, one or several, of `generation` or else of `config`.

        Raises OptionError where those are no ids.
        """
        return self.token_ids("eos_token_id")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Returns the ids that a setting such as `bos_token_id` names, none where it is missing or null."""
        found = self.generation.get(name)
        found = self.config.get(name) if found is None else found
        ids = tuple(found) if isinstance(found, list | tuple) else () if found is None else (found,)
        if not all(type(each) is int for each in ids):
            raise OptionError(f"the model's card: {name} is {found!r}, expected a token id or a list of them")
        return ids


def to_json(card: Card | None) -> dict[str, Any] | None:
    """Returns a card as JSON holds it; OptionError where it holds anything that JSON does not."""
    if card is None:
        return None
    fields = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
    return {name: _plain(value, name, _DEPTH) for name, value in fields.items()}


def from_json(data: Any) -> Card | None:
    """Reads what `to_json` gave. Raises OptionError, naming the field, for anything else."""
    if data is None:
        return None
    names = [field.name for field in dataclasses.fields(Card)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise OptionError(f"the model's card: expected an object of {', '.join(names)}, found {_shown(data)}")
    card = Card(**{name: _plain(value, name, _DEPTH) for name, value in data.items()})
    for name in ("config", "generation", "special_tokens"):
        if not isinstance(data[name], dict):
            raise OptionError(f"the model's card: {name} is {_shown(data[name])}, expected an object")
    if not isinstance(card.chat_template, str | None):
        raise OptionError(f"the model's card: chat_template is {_shown(card.chat_template)}, expected text or null")
    if not all(isinstance(text, str) for text in card.special_tokens.values()):
        raise OptionError(f"the model's card: special_tokens is {_shown(card.special_tokens)}, expected texts by name")
    _ = card.stop_tokens  # raises where they are no ids
    return card


def _plain(value: Any, where: str, depth: int) -> Any:
    """Returns a value as JSON gives it back: mappings as dictionaries, tuples as lists."""
    if depth == 0:
        raise OptionError(f"the model's card: {where} is nested deeper than {_DEPTH}")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(each, f"{where}.{key}", depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, where, depth - 1) for each in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and not math.isnan(value)):
        return value
    raise OptionError(f"the model's card: {where} is {_shown(value)}, which JSON does not hold")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
