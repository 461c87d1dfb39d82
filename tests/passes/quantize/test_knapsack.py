"""The knapsack against trying every choice."""

import itertools

import numpy as np
import pytest

from xlathe.passes.quantize.algorithms.knapsack import LIMIT, Item, choose


def drawn(rng: np.random.Generator) -> tuple[list[Item], int]:
    counts = rng.integers(1, 5, rng.integers(1, 6))
    items = [Item(rng.integers(1, 40, count), rng.exponential(size=count)) for count in counts]
    least, most = (sum(int(f(item.sizes)) for item in items) for f in (np.min, np.max))
    return items, int(rng.integers(least, most + 1))


def best(items: list[Item], budget: int) -> float:
    """The least loss of all choices that fit."""
    every = itertools.product(*(zip(item.sizes, item.losses, strict=True) for item in items))
    return min(sum(loss for _, loss in each) for each in every if sum(size for size, _ in each) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_best_of_all_choices(seed: int) -> None:
    items, budget = drawn(np.random.default_rng(seed))
    found = choose(items, budget)
    assert found.loss == pytest.approx(best(items, budget), abs=1e-12) and found.bound == found.loss
    assert found.size == sum(item.sizes[pick] for item, pick in zip(items, found.picks, strict=True)) <= budget
    losses = [item.losses[pick] for item, pick in zip(items, found.picks, strict=True)]
    assert found.loss == pytest.approx(sum(losses), rel=1e-12)


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_proved_is_bounded(seed: int, limit: int) -> None:
    items, budget = drawn(np.random.default_rng(seed))
    found, least = choose(items, budget, limit), best(items, budget)
    assert found.bound <= least + 1e-12 <= found.loss + 2e-12 and found.size <= budget


def test_sums_that_the_relaxation_cannot_tell_apart() -> None:
    """Every option costs its size. Expected: as good as for a budget less by an interval an item, and a true bound."""
    rng = np.random.default_rng(0)
    sizes = [rng.integers(1000, 100_000, 6) for _ in range(40)]
    found = choose([Item(size, 200_000.0 - size) for size in sizes], budget := 2_000_000)
    assert found.bound == 40 * 200_000 - budget <= found.loss <= found.bound + 40 * budget / LIMIT
    assert found.size <= budget


def test_hundreds_of_weights_are_exact() -> None:
    """Losses fall by 4 a bit, weights differ by orders of magnitude."""
    rng = np.random.default_rng(1)
    bits, shapes = np.array([3.4375, 4.5, 5.5, 6.5625, 8.5]), rng.choice([65536, 131072, 262144], 300)
    scales = rng.lognormal(0, 2, 300) * shapes
    items = [Item((n * bits / 8).astype(np.int64), s * 4.0**-bits) for n, s in zip(shapes, scales, strict=True)]
    found = choose(items, int(shapes.sum() * 4.9 / 8))
    assert found.bound == found.loss and found.size <= shapes.sum() * 4.9 / 8
    assert found == choose(items, int(shapes.sum() * 4.9 / 8))
