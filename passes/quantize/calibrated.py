"""Methods of rounding by the algorithms of `algorithms/`: each hands it the weight and what calibration saw."""

import abc
import dataclasses
import functools
from typing import ClassVar, Literal, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError, PassError
from xlathe.passes.quantize.algorithms import autoround, awq, gptq, hqq, search
from xlathe.passes.quantize.algorithms.blocks import output_error
from xlathe.passes.quantize.method import Method
from xlathe.stats import InputStats
from xlathe.storage import Blocks, Format, Scaled, Steps
from xlathe.storage.elements import INTEGERS


class OnLevels(Method):
    """A method that chooses scales, and levels of them.

    integers: whether the levels must be whole numbers. A weight that calibration never reached is rounded to nearest.
    """

    integers: ClassVar[bool] = False

    @final
    def refusal(self, stored: Format) -> str | None:
        if not isinstance(stored, Scaled):
            return "it chooses levels and scales, which this format does not have"
        if self.integers and stored.element not in INTEGERS:
            return "what it learns is added to whole numbers, which this format does not have"
        return None

    @final
    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled)
        if stats is not None and not stats.count:
            return stored.encode(weight)
        try:
            levels, steps = self.choose(jnp.asarray(weight), stored, stats)
        except PassError as error:
            raise PassError(f"quantize: {name}: {error}") from None
        if not np.isfinite(levels).all():
            raise PassError(f"quantize: {name}: {self} found levels that are not finite")
        return stored.pack(levels, steps)

    @abc.abstractmethod
    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        """Returns levels [n, k] and steps of a weight float32 [n, k]; stats: of some tokens, if it wants any."""


def _nearest(weight: jax.Array, stored: Scaled, steps: Steps) -> tuple[jax.Array, Steps]:
    return stored.nearest(weight, *stored.spread(steps, weight.shape)), steps


def _importance(stats: InputStats) -> np.ndarray:
    """Returns what the error of each column counts, float32 [k]: the mean of x^2."""
    return (stats.sum_squares / stats.count).astype(np.float32)


def _searched(weight: jax.Array, stored: Scaled, stats: InputStats) -> Steps:
    return search.search_steps(weight, jnp.asarray(_importance(stats)), stored)


@final
@dataclasses.dataclass(frozen=True)
class SearchLevels(OnLevels):
    """`Search` of formats with levels and scales."""

    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        assert stats is not None
        return _nearest(weight, stored, _searched(weight, stored, stats))


@final
@dataclasses.dataclass(frozen=True)
class Search(Method):
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
        assert stats is not None and stats.gram is not None
        steps = _searched(weight, stored, stats) if self.search else stored.fit(weight)
        levels, _ = gptq.gptq(weight, stats.gram, stored, steps, act_order=self.act_order)
        return levels, steps


@final
@dataclasses.dataclass(frozen=True)
class AutoRound(OnLevels):
    """Signed gradient descent on rounding and clipping: `xlathe.passes.quantize.algorithms.autoround`.

    The loss is the squared error of the weight's own products; the published one is that of a whole layer's output.
    """

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"
    integers: ClassVar[bool] = True

    steps: int = autoround.STEPS

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise OptionError(f"auto_round: steps={self.steps!r}: expected a positive number")

    def choose(self, weight: jax.Array, stored: Scaled, stats: InputStats | None) -> tuple[jax.Array, Steps]:
        assert stats is not None and stats.gram is not None
        gram = jnp.asarray(stats.gram / stats.count, jnp.float32)
        loss = functools.partial(_products_error, stored)
        tuned, _ = autoround.tune(autoround.start(weight, stored), loss, weight, gram, steps=self.steps)
        return autoround.choose(weight, tuned, stored)


def _products_error(
    stored: Scaled, tuned: autoround.Tuned, step: jax.Array, weight: jax.Array, gram: jax.Array
) -> jax.Array:
    return output_error(weight, autoround.stands_for(weight, tuned, stored), gram)
