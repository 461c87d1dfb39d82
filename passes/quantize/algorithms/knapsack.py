"""The multiple-choice knapsack: one option for each item, the least loss that fits a budget; exact, or with a bound.

Items are taken one after the other, and of all sums so far those are kept that no other beats in both size and loss
(Nemhauser & Ullmann 1969, https://doi.org/10.1287/mnsc.15.9.494). The relaxation that pays for size by a multiplier
(Everett 1963, https://doi.org/10.1287/opre.11.3.399) says what the rest can achieve at best: sums that cannot lead
below a solution that is known already are dropped, and few are left.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LIMIT = 1 << 14  # sums that are kept at a time
HALVINGS = 200  # of the interval that the multiplier lies in


@dataclasses.dataclass(frozen=True)
class Item:
    """One item's options. sizes: int64 [options]; losses: float64 [options], finite."""

    sizes: np.ndarray
    losses: np.ndarray

    def paid(self, multiplier: float) -> np.ndarray:
        """Returns what each option costs where size is paid for."""
        return self.losses + multiplier * self.sizes


@dataclasses.dataclass(frozen=True)
class Choice:
    """picks: the option of each item. bound: no choice that fits loses less; equal to the loss where that is proved."""

    picks: tuple[int, ...]
    size: int
    loss: float
    bound: float


def choose(items: Sequence[Item], budget: int, limit: int = LIMIT) -> Choice:
    """Returns the choice of least loss among those of at most `budget` in size; of equal ones always the same.

    limit: the most sums that are kept at a time. Where more could lead to the least loss, the budget is divided into so
    many intervals and the best of each is kept: the result is at least as good as any for a budget that is smaller by
    one interval an item, and `bound` tells what those that were left out promised. The least sizes of all items must
    fit the budget.
    """
    multiplier, picks = _relaxed(items, budget)
    known = _total(items, picks)
    rest = np.cumsum([0.0, *(item.paid(multiplier).min() for item in reversed(items))])[::-1]
    least = np.cumsum([0, *(item.sizes.min() for item in reversed(items))])[::-1]
    slack = 1e-12 * (abs(known[1]) + multiplier * budget)  # sums in another order differ by rounding
    sizes, losses, dropped = np.zeros(1, np.int64), np.zeros(1), np.inf
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for number, item in enumerate(items, 1):
        size = (sizes[:, None] + item.sizes).reshape(-1)
        loss = (losses[:, None] + item.losses).reshape(-1)
        promise = loss + multiplier * (size - budget) + rest[number]
        kept = np.flatnonzero((size + least[number] <= budget) & (promise <= known[1] + slack))
        kept = kept[_frontier(size[kept], loss[kept])]
        if len(kept) > limit:
            best = _thinned(size[kept], budget, limit)
            dropped = min(dropped, float(np.delete(promise[kept], best).min()))
            kept = kept[best]
        sizes, losses = size[kept], loss[kept]
        steps.append((kept // len(item.sizes), kept % len(item.sizes)))
    if len(losses) and losses.min() <= known[1]:
        picks = _followed(steps, int(losses.argmin()))
    size, loss = _total(items, picks)
    return Choice(tuple(picks), size, loss, min(loss, dropped))


def _relaxed(items: Sequence[Item], budget: int) -> tuple[float, list[int]]:
    """Returns the least multiplier whose choice fits, and that choice."""

    def chosen(multiplier: float) -> list[int]:
        return [int(np.lexsort((item.sizes, item.paid(multiplier)))[0]) for item in items]

    low, high = 0.0, 1e-12
    if _total(items, picks := chosen(0.0))[0] <= budget:
        return 0.0, picks
    while _total(items, chosen(high))[0] > budget:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _total(items, chosen(middle))[0] <= budget
        low, high = (low, middle) if fits else (middle, high)
    return high, chosen(high)


def _total(items: Sequence[Item], picks: Sequence[int]) -> tuple[int, float]:
    size = sum(int(item.sizes[pick]) for item, pick in zip(items, picks, strict=True))
    return size, math.fsum(item.losses[pick] for item, pick in zip(items, picks, strict=True))


def _frontier(size: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Returns which sums no other beats, by size."""
    order = np.lexsort((loss, size))
    before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))[:-1]
    return order[loss[order] < before]


def _thinned(size: np.ndarray, budget: int, limit: int) -> np.ndarray:
    """Returns the last sum, which loses least, of each interval of sizes."""
    intervals = size * limit // (budget + 1)
    return np.flatnonzero(np.diff(intervals, append=limit))


def _followed(steps: Sequence[tuple[np.ndarray, np.ndarray]], at: int) -> list[int]:
    """Returns the picks that led to a sum."""
    picks = []
    for parents, options in reversed(steps):
        picks.append(int(options[at]))
        at = int(parents[at])
    return picks[::-1]
