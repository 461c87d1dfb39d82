"""Methods of rounding by the algorithms of `algorithms/`: each hands it the weight and what calibration saw."""

import abc
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import PassError
from xlathe.passes.quantize.algorithms import awq, gptq, hqq, search
from xlathe.passes.quantize.method import Method, WeightMethod
from xlathe.stats import InputStats
from xlathe.storage import Blocks, Format, Masked, Scaled, Scattered, Steps

SEARCHED_AT_ONCE = 1 << 16
"""Weights whose scales are searched for in one go."""
NO_LEVELS = "it chooses levels and scales, which this format does not have"


class OnLevels(WeightMethod):
    """A method that chooses scales, and levels of them. What calibration never reached is rounded to nearest."""

    @final
    def refusal(self, stored: Format) -> str | None:
        if isinstance(stored, Masked | Scattered):
            return "which weights stay is chosen by sparse_gpt, wanda or magnitude"
        return None if isinstance(stored, Scaled) else NO_LEVELS

    @final
    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled)
        if stats is not None and not stats.count:
            return stored.encode(weight)
        with _named(name, stats):
            levels, steps = self.choose(jnp.asarray(weight), stored, stats)
        check_levels(name, self, levels)
        return stored.pack(levels, steps)

    @abc.abstractmethod
    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        """Returns levels [n, k] and steps of a weight float32 [n, k]; stats: of some tokens, if it wants any."""


@contextlib.contextmanager
def _named(name: str, stats: InputStats | None) -> Iterator[None]:
    """Names the weight in what a method refuses, and how many tokens it was calibrated on."""
    try:
        yield
    except PassError as error:
        seen = "" if stats is None else f", calibrated on {int(stats.count)} tokens"
        raise PassError(f"quantize: {name}{seen}: {error}") from None


def check_levels(name: str, method: Method, levels: Any) -> None:
    """Raises PassError where levels are not finite."""
    if not np.isfinite(levels).all():
        raise PassError(f"quantize: {name}: {method} found levels that are not finite")


def _nearest(weight: jax.Array, stored: Scaled, steps: Steps) -> tuple[jax.Array, Steps]:
    return stored.nearest(weight, *stored.spread(steps, weight.shape)), steps


def _importance(stats: InputStats) -> np.ndarray:
    """Returns what the error of each column counts, float32 [k]: the mean of x^2."""
    return (stats.sum_squares / stats.count).astype(np.float32)


def _searched(weight: jax.Array, stored: Scaled, stats: InputStats) -> Steps:
    """Columns count by the mean of x^2. Rows that share nothing go a few at a time, as fit into a cache."""
    importance = jnp.asarray(_importance(stats))
    apart = stored.rows == 1 and stored.scale != "e4m3"
    rows = max(SEARCHED_AT_ONCE // weight.shape[1], 1) if apart else len(weight)

    def some(start: int) -> Steps:
        return jax.block_until_ready(search.search_steps(weight[start : start + rows], importance, stored))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(some, range(0, len(weight), rows)))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@final
@dataclasses.dataclass(frozen=True)
class SearchLevels(OnLevels):
    """`Search` of formats with levels and scales."""

    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        assert stats is not None
        return _nearest(weight, stored, _searched(weight, stored, stats))


@final
@dataclasses.dataclass(frozen=True)
class Search(WeightMethod):
    """Scales with the least error, where each column counts by the mean square of its activations (an importance
    matrix): `xlathe.passes.quantize.algorithms.search`, and in llama.cpp's blocks the search of llama.cpp."""

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "moments"

    def refusal(self, stored: Format) -> str | None:
        return None if isinstance(stored, Blocks) else SearchLevels().refusal(stored)

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        if not isinstance(stored, Blocks):
            return SearchLevels()(name, weight, stored, stats)
        return stored.encode(weight, _importance(stats) if stats is not None and stats.count else None)


@final
@dataclasses.dataclass(frozen=True)
class Hqq(OnLevels):
    """Half-quadratic quantization, without calibration: `xlathe.passes.quantize.algorithms.hqq`."""

    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        return _nearest(weight, stored, hqq.hqq(weight, stored))


@final
@dataclasses.dataclass(frozen=True)
class Clip(OnLevels):
    """AWQ's search for ranges (its scales are the pass `AwqScales`): `xlathe.passes.quantize.algorithms.awq`."""

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        assert stats is not None and stats.gram is not None
        return _nearest(weight, stored, awq.clip_ranges(weight, jnp.asarray(stats.gram, jnp.float32), stored))


@final
@dataclasses.dataclass(frozen=True)
class Gptq(OnLevels):
    """The error of a column is made good by those not yet rounded: `xlathe.passes.quantize.algorithms.gptq`.

    act_order: columns with the largest activations first. search: scales as `Search` chooses them; else they just reach
    the largest weights.
    """

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    act_order: bool = True
    search: bool = True

    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        assert stats is not None
        found, steps = self._rounded(weight, stored, stats)
        return found.levels, steps

    def start(self, name: str, weight: np.ndarray, stored: Scaled, stats: InputStats) -> tuple[gptq.Rounded, Steps]:
        """Returns what it rounds, levels and steps, for a method that goes on from there."""
        with _named(name, stats):
            found, steps = self._rounded(jnp.asarray(weight), stored, stats)
        check_levels(name, self, found.levels)
        return found, steps

    def _rounded(self, weight: jax.Array, stored: Scaled, stats: InputStats) -> tuple[gptq.Rounded, Steps]:
        assert stats.gram is not None
        steps = _searched(weight, stored, stats) if self.search else stored.fit(weight)
        return gptq.gptq(weight, stats.gram, stored, steps, act_order=self.act_order), steps
