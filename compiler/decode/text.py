"""From token ids to text while they are generated: whole characters, and nothing from a stop string on."""

from collections.abc import Iterable, Sequence
from typing import final

from tokenizers import Tokenizer

from xlathe.errors import OptionError

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no character, hence at the end of one that is not complete."""


@final
class TextStream:
    """Turns the ids of one row into pieces of text.

    Joined, the pieces are `tokenizer.decode` of all ids, or its part before the first stop string. That is
    the one that is complete first, whichever way the ids were divided into pushes; of those that end
    together it is the longest. Text that may yet become a stop string is held back.

    stopped: the stop string that was found, or None; from then on pushes return nothing. taken: how many ids have been
    read; those after the one that completed a stop string do not count.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        """Special tokens have no text. Raises OptionError where `stop` is no string or several, or one is empty."""
        self._decoder = _Decoder(tokenizer)
        self._stops = _checked(stop)
        self._held = ""
        self.stopped: str | None = None
        self.taken = 0

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that has become certain."""
        pieces = []
        for token in ids:
            if self.stopped is not None:
                break
            self.taken += 1
            pieces.append(self._release(self._decoder.push(int(token))))
        return "".join(pieces)

    def finish(self) -> str:
        """Returns the text held back until now, when no more ids will come."""
        piece = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return piece + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = _first_stop(text, self._stops)
        if found is None:
            certain = len(text) - _beginning(text, self._stops)
            self._held = text[certain:]
            return text[:certain]
        start, self.stopped = found
        self._held = ""
        return text[:start]


@final
class _Decoder:
    """Decodes ids in a window that begins with those of the piece before.

    They are there because decoders treat the beginning of a text in a way of its own, such as dropping a
    space. (`tokenizers.decoders.DecodeStream` raises where bytes given as byte-fallback tokens are no text.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        self._ids.append(token)
        piece = self._pending()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._before, self._ids = self._ids, []
        return piece

    def finish(self) -> str:
        piece = self._pending()
        self._before, self._ids = [], []
        return piece

    def _pending(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._before + self._ids)[len(decode(self._before)) :]


def _checked(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(each, str) and each for each in stops):
        raise OptionError(f"stop: expected strings that are not empty, found {stop!r}")
    return tuple(stops)


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Returns where the stop string that ends first starts, and the string."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` with which a stop string begins."""
    longest = min(len(text), max(map(len, stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
