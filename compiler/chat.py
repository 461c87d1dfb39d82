"""Messages become a prompt by the model's own chat template, a Jinja program that is nobody's to trust.

It runs in a sandbox (`minijinja`): it sees plain data alone, may recurse and count only so far, and reads no files.
(Steps are counted, bytes are not: a list that holds itself twice, forty times over, still takes all memory when shown.)
What Hugging Face's `apply_chat_template` gives a template is here too.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import minijinja
from tokenizers import Tokenizer

from xlathe.card import Card
from xlathe.errors import RequestError

Messages = Sequence[Mapping[str, Any]]
FUEL = 5_000_000  # steps of the engine, half a second of them; a chat of 1,000 messages takes some 100,000
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def render_chat(
    card: Card | None,
    tokenizer: Tokenizer | None,
    messages: Messages,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
) -> str:
    """Returns the prompt that a model's template makes of messages.

    messages: mappings with a `role` and what it needs, of plain JSON types; tools: JSON schemas of functions, for
    templates that know them. The text holds the special tokens, the one at the beginning included where the template
    writes it: encode it without adding any (`encode_chat`).

    Raises RequestError where the model has no template, where messages are none or the template refuses them, and where
    the template itself is wrong or takes more than FUEL steps.
    """
    if card is None or not card.chat_template:
        raise RequestError(
            "this model has no chat template (`chat_template` of its card), so it takes no messages; `generate` "
            "continues plain text"
        )
    values = {
        **special_tokens(card, tokenizer),
        "messages": _messages(messages),
        "tools": None if tools is None else _plain("tools", list(tools)),
        "add_generation_prompt": bool(add_generation_prompt),
    }
    try:
        return _environment().render_str(_without_generation(card.chat_template), "chat template", **values)
    except minijinja.TemplateError as error:
        raise RequestError(f"the chat template cannot be used: {_reason(error)}") from None
    except RequestError:
        raise
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise RequestError(f"the chat template cannot be used: {error}") from None


def encode_chat(
    card: Card | None, tokenizer: Tokenizer | None, messages: Messages, tools: Sequence[Any] | None = None
) -> list[int]:
    """Returns the token ids of `render_chat`. Nothing is put before them: beginnings are the template's to write.

    Raises RequestError as `render_chat` does, and where there is no tokenizer.
    """
    text = render_chat(card, tokenizer, messages, tools=tools)
    if tokenizer is None:
        raise RequestError("this model has no tokenizer, which a chat needs")
    return tokenizer.encode(text, add_special_tokens=False).ids


def special_tokens(card: Card, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Returns the texts of the special tokens by the names that templates use, without those that a model lacks."""
    ids = {name: card.token_ids(f"{name}_id")[:1] for name in NAMES if name not in card.special_tokens}
    found = {name: tokenizer.id_to_token(*ids[name]) for name in ids if ids[name] and ids[name][0] >= 0 and tokenizer}
    return {**{name: text for name, text in found.items() if text is not None}, **card.special_tokens}


def end_of_turn(card: Card | None, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Returns the id of `eos_token`, which ends an answer even where `generation_config.json` does not list it."""
    text = None if card is None else special_tokens(card, tokenizer).get("eos_token")
    token = None if tokenizer is None or text is None else tokenizer.token_to_id(text)
    return () if token is None else (token,)


def _messages(messages: Messages) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages: expected a list of mappings with role and content, found {_shown(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {i}: expected a mapping with a `role`, found {_shown(message)}")
    plain: list[dict[str, Any]] = _plain("messages", [dict(message) for message in messages])
    return plain


def _plain(name: str, value: Any) -> Any:
    """Returns a copy of plain JSON types: of an object with attributes a template could read and call all of them."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: expected plain JSON types: {error}") from None


def _environment() -> minijinja.Environment:
    """Returns an environment that renders as the one of Hugging Face does."""
    return minijinja.Environment(
        debug=False,
        fuel=FUEL,
        pycompat=True,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_escape_callback=lambda _: False,
        filters={"tojson": _to_json},
        globals={"raise_exception": _raise, "strftime_now": _now},
    )


def _raise(message: Any) -> None:
    raise RequestError(f"the chat template refuses the messages: {message}")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which a prompt is not."""
    separators = None if separators is None else tuple(separators)
    if (isinstance(indent, int) and indent > 16) or len(str(indent)) > 16 or len(str(separators)) > 64:
        raise RequestError("the chat template asks for an indent or separators that are too long")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _without_generation(template: str) -> str:
    """Hugging Face's `{% generation %}` marks what a model wrote, for training; in a prompt it does nothing."""
    start = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
    return re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", start)


def _reason(error: minijinja.TemplateError) -> str:
    if error.kind == "OutOfFuel":
        return f"it takes more than {FUEL} steps"
    return str(error).partition("\n")[0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
