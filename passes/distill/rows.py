"""Text as rows to train on: which rows a step sees depends on its number and the seed alone."""

import dataclasses
import functools
from typing import final

import numpy as np

from xlathe.errors import OptionError


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Windows of a text, one token longer than what a model reads at once, with the rest of the text at the end.

    tokens: int32 [n, length + 1]; mask: bool [n, length], whether the token after each is there to be learned.
    """

    tokens: np.ndarray
    mask: np.ndarray

    @staticmethod
    def cut(tokens: np.ndarray, length: int) -> "Rows":
        """Cuts int [count] into windows; each token but the first is learned once. OptionError for less than two."""
        if length < 1:
            raise OptionError(f"expected rows of at least 1 token, got a length of {length}")
        if tokens.size < 2:
            raise OptionError(f"the text has {tokens.size} tokens, expected at least 2 to learn from")
        count = -(-(tokens.size - 1) // length)
        padded = np.zeros(count * length + 1, np.int32)
        padded[: tokens.size] = tokens
        places = np.arange(count)[:, None] * length + np.arange(length + 1)
        return Rows(padded[places], places[:, 1:] < tokens.size)

    @property
    def length(self) -> int:
        """The tokens that a model reads at once."""
        return int(self.mask.shape[1])

    def at(self, step: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens, mask and numbers [count] of the rows of a step: each row once an epoch, in a drawn order."""
        whole = len(self.tokens)
        places = range(step * count, (step + 1) * count)
        numbers = np.array([_order(whole, place // whole, seed)[place % whole] for place in places])
        return self.tokens[numbers], self.mask[numbers], numbers


@functools.lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
