"""A card is saved and read back as it was; what is none is refused by the name of its field."""

from typing import Any

import pytest

from xlathe.card import Card, from_json, to_json
from xlathe.errors import OptionError

CONFIG = {"model_type": "llama", "sizes": [1, {"a": None}]}
CARD = Card(CONFIG, {"eos_token_id": [1, 2]}, "{{ x }}", {"bos_token": "<s>"})
GOOD = to_json(CARD)


def test_reads_back() -> None:
    assert from_json(to_json(CARD)) == CARD and from_json(to_json(None)) is None
    assert to_json(Card({"a": (1, 2)})) == to_json(Card({"a": [1, 2]}))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, None, ()), (None, 3, (3,)), ([4, 5], 3, (4, 5)), (0, 3, (0,)), (None, [3], (3,))],
)
def test_stop_tokens(generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    assert Card({"eos_token_id": config}, {"eos_token_id": generation}).stop_tokens == expected


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"more": 1}, "expected an object of config, generation, chat_template, special_tokens"),
        ({"config": []}, r"config is \[\], expected an object"),
        ({"chat_template": 3}, "chat_template is 3, expected text or null"),
        ({"special_tokens": {"bos_token": 3}}, "special_tokens is .*, expected texts by name"),
        ({"generation": {"eos_token_id": "2"}}, "eos_token_id is '2', expected a token id"),
        ({"generation": {"eos_token_id": [True]}}, r"eos_token_id is \[True\], expected a token id"),
        ({"config": nested(900)}, "nested deeper than 32"),
        ({"config": {"a": float("nan")}}, "config.a is nan, which JSON does not hold"),
    ],
)
def test_what_is_no_card(changes: dict[str, Any], expected: str) -> None:
    assert GOOD is not None
    with pytest.raises(OptionError, match=expected):
        from_json({**GOOD, **changes})
    with pytest.raises(OptionError, match="expected an object of"):
        from_json([])


def test_what_json_does_not_hold_is_not_saved() -> None:
    with pytest.raises(OptionError, match=r"config\.a is <object .*, which JSON does not hold"):
        to_json(Card({"a": object()}))
