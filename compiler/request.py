"""What one call of a program asks for, checked against what was compiled."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from xlathe.aot import STOP_TOKENS, Buckets
from xlathe.decode.logits import Sampling
from xlathe.errors import RequestError
from xlathe.integers import as_integer

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | np.ndarray
Stops = str | int | Iterable[str | int] | None


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts as token ids, and how they are continued; rows: of the program that serves them."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: Sampling  # of all rows of the program
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    rows: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests to a program must fit; stop_tokens: those of every request."""

    buckets: Buckets
    vocab: int
    tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...]

    def request(self, prompt: Prompts, max_tokens: int, stop: Stops, **sampling: Any) -> Request:
        """Raises RequestError where a request does not fit, OptionError for sampling options out of range."""
        prompts = self._prompts(prompt)
        rows = self._rows(len(prompts))
        count = self._count(max_tokens, max(map(len, prompts)))
        tokens, strings = self._stops(stop)
        options = _padded(Sampling.of(len(prompts), **sampling), rows)
        return Request(prompts, count, options, tokens, strings, rows)

    def _prompts(self, prompt: Prompts) -> tuple[tuple[int, ...], ...]:
        rows = [prompt] if isinstance(prompt, str) else _items("prompt", prompt, "text, or a list of rows")
        if not rows:
            raise RequestError("no prompt was given: the list of rows is empty")
        if as_integer(rows[0]) is not None:
            ids = reprlib.repr([as_integer(x) for x in rows])
            raise RequestError(f"prompt is one flat list of token ids, expected a list of rows: [{ids}]")
        texts = [row for row in rows if isinstance(row, str)]
        if len(texts) not in (0, len(rows)):
            raise RequestError(f"prompt has {len(texts)} rows of text among {len(rows)}, expected all or none")
        return tuple(self._ids(i, self._encoded(i, row) if texts else row) for i, row in enumerate(rows))

    def _encoded(self, i: int, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("this program has no tokenizer; give token ids instead of text")
        try:
            plain, added = (self.tokenizer.encode(str(text), add_special_tokens=add).ids for add in (False, True))
        except (TypeError, ValueError) as error:
            raise RequestError(f"prompt {i} is no valid Unicode text: {error}") from None
        return plain if added[:2] == 2 * plain[:1] else added  # a text that begins with `<s>` gets no second one

    def _ids(self, i: int, row: Any) -> tuple[int, ...]:
        try:
            ids = np.asarray(row)
        except ValueError:  # nested lists of different lengths
            ids = np.asarray(None)
        if ids.ndim == 1 and not ids.size:
            raise RequestError(f"prompt {i} is empty, expected at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            found = f"holds {ids.dtype}" if ids.ndim == 1 and ids.dtype.kind != "O" else "is no list of token ids"
            raise RequestError(f"prompt {i} {found}: expected integers 0..{self.vocab - 1}, found {reprlib.repr(row)}")
        outside = ids[(ids < 0) | (ids >= self.vocab)]
        if outside.size:
            raise RequestError(f"prompt {i} has token id {outside[0]}, outside the vocabulary 0..{self.vocab - 1}")
        return tuple(ids.tolist())

    def _rows(self, count: int) -> int:
        fitting = [r for r in self.buckets.batches if r >= count]
        if not fitting:
            raise RequestError(f"{count} rows, but the program was compiled with max_batch={max(self.buckets.batches)}")
        return min(fitting)

    def _count(self, max_tokens: Any, longest: int) -> int:
        count = as_integer(max_tokens)
        if count is None or count < 1:
            raise RequestError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")
        if longest + count > self.buckets.slots:
            raise RequestError(
                f"a prompt of {longest} tokens and max_tokens={count} need {longest + count} positions, but the "
                f"program was compiled with max_len={self.buckets.slots}"
            )
        return count

    def _stops(self, stop: Stops) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Returns the ids and the strings that end a row."""
        expected = f"strings that are not empty, or token ids 0..{self.vocab - 1}"
        alone = isinstance(stop, str) or as_integer(stop) is not None
        each = [stop] if alone else _items("stop", () if stop is None else stop, expected)
        strings = tuple(s for s in each if isinstance(s, str))
        ids = [as_integer(s) for s in each if not isinstance(s, str)]
        tokens = tuple(dict.fromkeys((*self.stop_tokens, *(i for i in ids if i is not None and 0 <= i < self.vocab))))
        if "" in strings or not set(ids) <= set(tokens):
            raise RequestError(f"stop: expected {expected}; found {reprlib.repr(stop)}")
        if len(tokens) > STOP_TOKENS:
            raise RequestError(f"{len(tokens)} stop tokens, but a program takes at most {STOP_TOKENS}")
        if strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this program has none; use stop token ids")
        return tokens, strings


def _items(name: str, value: Any, expected: str) -> list[Any]:
    try:
        if not isinstance(value, bytes | Mapping):
            return list(value)
    except TypeError:
        pass
    raise RequestError(f"{name}: expected {expected}; found {reprlib.repr(value)}")


def _padded(sampling: Sampling, rows: int) -> Sampling:
    """Repeats the first row's options for rows that nobody asked for."""
    missing = rows - sampling.temperature.shape[0]
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)]), sampling)
