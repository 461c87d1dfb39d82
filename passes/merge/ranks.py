"""Numbers at a rank of magnitudes, exact, by counting.

Two passes: over the upper 15 bits of magnitudes, float32 without their signs, then over the lower 16 of those that
share them. Counts add up, so neither the order of arrays nor where they are cut matters, and nothing is sorted.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

CHUNK = 1 << 20
"""Numbers that are counted at a time."""
LOW, HIGH = 16, 15
"""Bits."""
_ALL = (1 << 31) - 1

Read = Callable[[], Iterable[jax.Array | np.ndarray]]
"""Called once a pass, yields the same float32 arrays [...] in the same order."""


@dataclasses.dataclass(frozen=True)
class Band:
    """Magnitudes that are kept, as bits: those above `least`, and of those equal to it the ones at places before `end`;
    not those above `most`, nor of those equal to it the ones before `start`. Places are counted over all arrays."""

    least: int = 0
    end: int = _ALL
    most: int = _ALL
    start: int = 0


def find_band(read: Read, top: int, count: int) -> Band:
    """Returns what keeps `count` numbers, at least 1, after the `top` largest; of equal ones those that come first."""
    least, end = _edge(read, top + count)
    most, start = _edge(read, top) if top else (_ALL, 0)
    return Band(least, end, most, start)


def find_whole_band(read: Read, top: int, count: int) -> Band:
    """Returns what keeps at least `count` numbers after at most the `top` largest: all that are equal to the last ones
    on either side, so that the order of arrays does not matter."""
    (least, _, _), (most, _, _) = _at_ranks(read, [top + count - 1, top])
    return Band(least, _ALL, most, 0)


def _edge(read: Read, count: int) -> tuple[int, int]:
    """Returns the bits of the `count`-th largest number, and the place before which numbers equal to it are taken so
    that there are `count` in all."""
    ((least, before, equal),) = _at_ranks(read, [count - 1])
    if before + 1 == equal:
        return least, _ALL
    left, reached = before + 1, 0
    for bits in _chunks(read()):
        found = np.flatnonzero(bits == least)
        if len(found) >= left:
            return least, reached + int(found[left - 1]) + 1
        left, reached = left - len(found), reached + len(bits)
    raise AssertionError("other numbers than in the pass before")


def _at_ranks(read: Read, ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns for each rank, 0 for the largest, the bits of the number there, its rank among those equal to it, and how
    many these are."""
    upper = np.zeros(1 << HIGH, np.int64)
    for bits in _chunks(read()):
        upper += np.bincount(bits >> LOW, minlength=1 << HIGH)
    bins = [_bin(upper, rank) for rank in ranks]
    lower = {at: np.zeros(1 << LOW, np.int64) for at, _ in bins}
    for bits in _chunks(read()):
        for at, counts in lower.items():
            counts += np.bincount(bits[bits >> LOW == at] & (1 << LOW) - 1, minlength=1 << LOW)
    found = [(at, *_bin(lower[at], left)) for at, left in bins]
    return [(at << LOW | low, before, int(lower[at][low])) for at, low, before in found]


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
