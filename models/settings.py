"""Reading a `config.json`: every value is checked for its kind, and what a family does not know is refused by name."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from xlathe.errors import CheckpointError, brief

LARGEST = 2**24  # beyond every size that models have; what allocates or counts by a number from a file trusts this


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of a configuration. A value that is null counts as absent.

    where: the file, for error messages. All readers raise CheckpointError naming file, key, expected and found.
    """

    values: Mapping[str, Any]
    where: str = "config.json"

    def with_defaults(self, **defaults: Any) -> "Settings":
        """Returns these settings where a name that is left out has a default; one that is null stays so."""
        return Settings({**defaults, **self.values}, self.where)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a whole number of at least 1."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.wrong(name, f"a whole number from 1 to {LARGEST}", value)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Returns a whole number of at least 0."""
        value = self._value(name, default)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise self.wrong(name, f"a whole number from 0 to {LARGEST}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise self.wrong(name, "a number", value)
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if not 0 < value < float("inf"):
            raise self.wrong(name, "a positive number", value)
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def one_of(self, name: str, known: Iterable[str], default: str | None = None) -> str:
        value, known = self._value(name, default), sorted(known)
        if value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}", value)
        return str(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._value(name, None)
        if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):  # no bool
            raise self.wrong(name, "a list of numbers", value)
        return tuple(map(float, value))

    def optional_size(self, name: str) -> int | None:
        return self.size(name) if self.has(name) else None

    def optional_number(self, name: str) -> float | None:
        return self.positive(name) if self.has(name) else None

    def within(self, name: str) -> "Settings":
        """Returns the settings of the object under `name`."""
        value = self._value(name, None)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object", value)
        return Settings(value, f"{self.where}, {name}")

    def refuse(self, name: str, *, unless: Any, why: str) -> None:
        """Raises where a setting that changes the arithmetic has a value that is not built."""
        if self.has(name) and self.values[name] != unless:
            raise CheckpointError(f"{self.where}: {name} is {self.values[name]!r}: {why}")

    def wrong(self, name: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name}: expected {expected}, found {brief(found)}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return default if value is None else value
