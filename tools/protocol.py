"""How a text becomes windows, and which of their tokens are predicted: what perplexities can be compared with."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from xlathe.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

LONGEST = 2048  # of a window where nobody says how long: what papers on quantization report


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to evaluate a text.

    context: tokens a window where nobody says how many. second_half: score only what half a window precedes.
    begin_each: every window begins with the tokenizer's beginning of a text in place of its first token; otherwise only
    the text does, before its first token. clustered: errors are those of means over windows, whose tokens resemble each
    other (https://arxiv.org/abs/2411.00640); otherwise tokens are taken as independent.
    """

    name: str
    context: int
    second_half: bool
    begin_each: bool
    clustered: bool

    def first(self, length: int) -> int:
        """The first position of a window whose next token is scored."""
        return length // 2 if self.second_half else 0

    def describe(self, length: int) -> str:
        scored = f"tokens {self.first(length) + 2} to {length} of each scored"
        errors = "over windows" if self.clustered else "over tokens as if independent"
        return f"protocol {self.name}: windows of {length} tokens, {scored}; errors {errors}"


# What the tool llama-perplexity does: https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity
LLAMA_CPP: Final = Protocol("llama.cpp", 512, second_half=True, begin_each=True, clustered=False)
WINDOWS: Final = Protocol("windows", LONGEST, second_half=False, begin_each=False, clustered=True)
PROTOCOLS: Final = (LLAMA_CPP, WINDOWS)


def find_protocol(name: str) -> Protocol:
    """Returns the protocol of that name; OptionError where there is none."""
    names = [each.name for each in PROTOCOLS]
    if name not in names:
        raise OptionError(f"no protocol {name!r}{did_you_mean(name, names)}")
    return PROTOCOLS[names.index(name)]


def beginning(tokenizer: "Tokenizer | None") -> list[int]:
    """Returns the tokens that a tokenizer puts before a text by itself."""
    if tokenizer is None:
        return []
    found = tokenizer.encode("a", add_special_tokens=True)
    return found.ids[: found.special_tokens_mask.index(0)] if 0 in found.special_tokens_mask else []


def cut(
    protocol: Protocol, tokens: Sequence[int], begin: Sequence[int], max_len: int, context: int | None
) -> "np.ndarray":
    """Returns windows int32 [n, length], n >= 2, of the tokens of a text: all but a rest shorter than one.

    begin: what a text begins with. max_len: the longest window that can be. context: its length, or None for the
    protocol's own, which a short text or model shortens. Raises OptionError where a text has no two windows.
    """
    import numpy as np

    row = np.asarray([*begin, *tokens], np.int32)
    length = _length(protocol, len(row), max_len, context)
    windows = row[: len(row) // length * length].reshape(-1, length).copy()
    if protocol.begin_each:
        windows[:, : len(begin)] = begin
    return windows


def _length(protocol: Protocol, count: int, max_len: int, context: int | None) -> int:
    least = next(n for n in range(2, 8) if n - 1 - protocol.first(n) > 0)  # one token is scored
    if context is None:
        length = min(protocol.context, max_len, count // 2)
        if length < least:
            raise OptionError(f"the text has {count} tokens, expected at least {2 * least}")
        return length
    if not least <= context <= max_len:
        raise OptionError(f"context={context}: expected {least} to {max_len}, the longest text that the models take")
    if count < 2 * context:
        raise OptionError(f"the text has {count} tokens, expected at least two windows of {context}")
    return context
