"""Numbers at a rank of magnitudes, exact, by counting.

Two passes: over the upper 15 bits of magnitudes, float32 without their signs, then over the lower 16 of those that
share them. Counts add up, so neither the order of arrays nor where they are cut matters, and nothing is sorted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

CHUNK = 1 << 20
"""Numbers that are counted at a time."""
LOW, HIGH = 16, 15
"""Bits."""


def at_ranks(read: Callable[[], Iterable[jax.Array | np.ndarray]], ranks: Sequence[int]) -> list[float]:
    """Returns the magnitudes at these ranks, 0 for the largest, of all numbers of all arrays.

    read: called twice, yields the same float32 arrays [...], in any order.
    """
    return [float(value) for value in np.array(_bits_at(read, ranks), np.int32).view(np.float32)]


def _bits_at(read: Callable[[], Iterable[jax.Array | np.ndarray]], ranks: Sequence[int]) -> list[int]:
    upper = np.zeros(1 << HIGH, np.int64)
    for bits in _chunks(read()):
        upper += np.bincount(bits >> LOW, minlength=1 << HIGH)
    bins = [_bin(upper, rank) for rank in ranks]
    lower = {at: np.zeros(1 << LOW, np.int64) for at, _ in bins}
    for bits in _chunks(read()):
        for at, counts in lower.items():
            counts += np.bincount(bits[bits >> LOW == at] & (1 << LOW) - 1, minlength=1 << LOW)
    return [at << LOW | _bin(lower[at], left)[0] for at, left in bins]


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


def edge(magnitude: jax.Array | np.ndarray, count: int) -> tuple[int, int]:
    """Returns the bits of the `count`-th largest number, and the place before which numbers equal to it are kept, so
    that there are `count` in all: of equal ones those that come first. count: at least 1, and at most all."""
    (least,) = _bits_at(lambda: iter([magnitude]), [count - 1])
    left = count - sum(np.count_nonzero(bits > least) for bits in _chunks([magnitude]))
    reached = 0
    for bits in _chunks([magnitude]):
        equal = np.flatnonzero(bits == least)
        if len(equal) >= left:
            return least, reached + int(equal[left - 1]) + 1
        left, reached = left - len(equal), reached + len(bits)
    raise AssertionError("a count of more numbers than there are")
