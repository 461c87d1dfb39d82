"""Ranks over a whole model: which magnitudes of its changes are kept, where one share is taken of all tensors together.

The numbers at a rank are found exactly, by two passes that count: once the upper 15 bits of magnitudes, float32 without
their signs, then the lower 16 of those that share them. Counts add up, so neither order nor shards matter.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from xlathe.errors import OptionError
from xlathe.passes.merge.masks import places

CHUNK = 1 << 20
"""Numbers that are counted at a time."""
LOW, HIGH = 16, 15
"""Bits."""


@dataclasses.dataclass(frozen=True)
class Band:
    """The magnitudes that are kept, both ends included: all numbers that are equal to an end are."""

    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Change:
    """What a model changed in one tensor. read: returns it, float32 [...]; density, gamma: as of `without_outliers`."""

    model: str
    name: str
    size: int
    read: Callable[[], jax.Array]
    density: float
    gamma: float


def check_shares(changes: Iterable[Change]) -> None:
    """Raises OptionError where a model's tensors have several densities, of which no threshold could be made."""
    first: dict[str, Change] = {}
    for each in changes:
        one = first.setdefault(each.model, each)
        if (one.density, one.gamma) != (each.density, each.gamma):
            raise OptionError(
                f"scope=model takes one density and gamma for all tensors of {each.model}; found {one.density}, "
                f"{one.gamma} for {one.name} and {each.density}, {each.gamma} for {each.name}"
            )


def find_bands(changes: Sequence[Change]) -> dict[str, Band]:
    """Returns what is kept of each model's changes, all taken as one vector. Reads every tensor twice."""
    found = {}
    for model in dict.fromkeys(each.model for each in changes):
        own = [each for each in changes if each.model == model]
        top, count = places(sum(each.size for each in own), own[0].density, own[0].gamma)
        most, least = at_ranks(lambda own=own: (each.read() for each in own), [top, top + count - 1])  # type: ignore[misc]
        found[model] = Band(least, most)
    return found


def at_ranks(read: Callable[[], Iterable[jax.Array | np.ndarray]], ranks: Sequence[int]) -> list[float]:
    """Returns the magnitudes at these ranks, 0 for the largest, of all numbers of all arrays.

    read: called twice, yields the same float32 arrays [...], in any order.
    """
    upper = np.zeros(1 << HIGH, np.int64)
    for bits in _chunks(read()):
        upper += np.bincount(bits >> LOW, minlength=1 << HIGH)
    bins = [_bin(upper, rank) for rank in ranks]
    lower = {at: np.zeros(1 << LOW, np.int64) for at, _ in bins}
    for bits in _chunks(read()):
        for at, counts in lower.items():
            counts += np.bincount(bits[bits >> LOW == at] & (1 << LOW) - 1, minlength=1 << LOW)
    whole = [at << LOW | _bin(lower[at], left)[0] for at, left in bins]
    return [float(value) for value in np.array(whole, np.int32).view(np.float32)]


def _chunks(arrays: Iterable[jax.Array | np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the bits of magnitudes, int32 [at most CHUNK]: as integers in the same order as the numbers."""
    for array in arrays:
        bits = np.asarray(array, np.float32).reshape(-1).view(np.int32)
        for start in range(0, bits.size, CHUNK):
            yield bits[start : start + CHUNK] & np.int32(0x7FFFFFFF)


def _bin(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Returns the bin that holds the number of a rank, counted from the last bin, and its rank there."""
    reached = np.cumsum(counts[::-1])
    i = int(np.searchsorted(reached, rank, side="right"))
    return len(reached) - 1 - i, rank - (int(reached[i - 1]) if i else 0)
