"""Passes as text: `canonicalize,specialize{batch=1,length=64}`, the one serial form of a pipeline.

A pass is named after its class in lower case with underscores. Options are written in the order of the
fields, those with their default left out; values are numbers, words, "quoted strings", true, false, none
and (tuples,).
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from xlathe.errors import OptionError, did_you_mean

_TOKEN = re.compile(r"""\s*(?:([A-Za-z_][\w./*-]*)|([-+]?[\d.][\w.+-]*)|("(?:[^"\\]|\\.)*")|([{}(),=]))""")
_WORD = re.compile(r"[A-Za-z_][\w./*-]*", re.ASCII)
_CONSTANTS = {"true": True, "false": False, "none": None, "inf": float("inf"), "nan": float("nan")}


def pass_name(cls: type) -> str:
    """Returns the name of a pass in text: `KVCache` is `kv_cache`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def print_pass(pass_: Any) -> str:
    """Prints a pass with the options that differ from their defaults."""
    options = [
        f"{field.name}={_print_value(getattr(pass_, field.name))}"
        for field in dataclasses.fields(pass_)
        if not _is_default(field, getattr(pass_, field.name))
    ]
    return pass_name(type(pass_)) + (f"{{{','.join(options)}}}" if options else "")


def parse_passes(text: str, table: Mapping[str, type]) -> list[Any]:
    """Returns the passes that a text names.

    table: pass classes by name.
    Raises OptionError for unknown passes and options and for values of a wrong type.
    """
    return _Reader(text, _tokens(text), table).passes()


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return type(default) is type(value) and default == value


def _print_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({''.join(_print_value(item) + ',' for item in value)})"
    if isinstance(value, str):
        bare = _WORD.fullmatch(value) and value not in _CONSTANTS
        return value if bare else json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    raise OptionError(
        f"{value!r} has no text form: options are numbers, strings, true, false, none and tuples"
    )


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    while text[position:].strip():
        found = _TOKEN.match(text, position)
        if found is None:
            raise OptionError(f"{text!r}: unexpected {text[position:].strip()[0]!r} at character {position}")
        tokens.append(found.group(0).strip())
        position = found.end()
    return tokens


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Takes tokens off the front of a list."""

    text: str
    tokens: list[str]
    table: Mapping[str, type]

    def passes(self) -> list[Any]:
        found = [self._pass()]
        while self.tokens:
            self._take(",")
            found.append(self._pass())
        return found

    def _take(self, expected: str = "") -> str:
        if not self.tokens or (expected and self.tokens[0] != expected):
            found = repr(self.tokens[0]) if self.tokens else "the end"
            raise OptionError(
                f"{self.text!r}: expected {repr(expected) if expected else 'more'}, found {found}"
            )
        return self.tokens.pop(0)

    def _next_is(self, token: str) -> bool:
        return bool(self.tokens) and self.tokens[0] == token

    def _pass(self) -> Any:
        name = self._take()
        if name not in self.table:
            raise OptionError(f"unknown pass {name!r}{did_you_mean(name, self.table)}")
        options = self._options(name) if self._next_is("{") else {}
        try:
            return self.table[name](**options)
        except TypeError as error:  # a required option is missing
            raise OptionError(f"{name}: {error}") from None

    def _options(self, name: str) -> dict[str, Any]:
        hints = typing.get_type_hints(self.table[name])
        fields = [field.name for field in dataclasses.fields(self.table[name])]
        options: dict[str, Any] = {}
        self._take("{")
        while not self._next_is("}"):
            key = self._take()
            if key not in fields:
                raise OptionError(f"{name} has no option {key!r}{did_you_mean(key, fields)}")
            if key in options:
                raise OptionError(f"{name}: the option {key!r} is given twice")
            self._take("=")
            options[key] = _typed(f"{name}: {key}", self._value(), hints[key])
            if not self._next_is("}"):
                self._take(",")
        self._take("}")
        return options

    def _value(self) -> Any:
        token = self._take()
        if token == "(":
            return self._tuple()
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token.startswith('"'):
            return self._parsed(json.loads, token)
        if _WORD.fullmatch(token):
            return token
        return self._parsed(lambda t: int(t) if re.fullmatch(r"[-+]?\d+", t) else float(t), token)

    def _tuple(self) -> tuple[Any, ...]:
        items = []
        while not self._next_is(")"):
            items.append(self._value())
            if not self._next_is(")"):
                self._take(",")
        self._take(")")
        return tuple(items)

    def _parsed(self, parse: Any, token: str) -> Any:
        try:
            return parse(token)
        except ValueError:
            raise OptionError(f"{self.text!r}: {token} is no value") from None


def _typed(where: str, value: Any, annotation: Any) -> Any:
    if not _fits(value, annotation):
        readable = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        raise OptionError(f"{where} must be {readable.replace('typing.', '')}, got {_print_value(value)}")
    return float(value) if annotation is float else value


def _fits(value: Any, annotation: Any) -> bool:
    """Says whether a parsed value is of a field's type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple and arguments[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        fits = isinstance(value, tuple) and len(value) == len(arguments)
        return fits and all(map(_fits, value, arguments))
    if annotation is None or annotation is types.NoneType:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(annotation, type) and isinstance(value, annotation)
