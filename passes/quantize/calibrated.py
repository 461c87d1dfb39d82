"""Methods of rounding by the algorithms of `algorithms/`: each hands it the weight and what calibration saw."""

import dataclasses
from typing import ClassVar, Literal, final

import jax.numpy as jnp
import numpy as np

from xlathe.errors import PassError
from xlathe.passes.quantize.algorithms import awq, gptq, hqq, search
from xlathe.passes.quantize.method import Method
from xlathe.stats import InputStats
from xlathe.storage import Format, Scaled, Steps

NEEDS_SCALES = "it chooses levels and scales, which this format does not have"


def _pack(stored: Scaled, weight: np.ndarray, steps: Steps) -> tuple[np.ndarray, ...]:
    return stored.pack(stored.nearest(jnp.asarray(weight), *stored.spread(steps, weight.shape)), steps)


def _importance(stats: InputStats) -> np.ndarray:
    """Returns the mean of x^2 of each column, float32 [k]."""
    return (stats.sum_squares / stats.count).astype(np.float32)


@final
@dataclasses.dataclass(frozen=True)
class Search(Method):
    """Scales with the least error, where each column counts by the mean square of its activations (an importance
    matrix): `xlathe.passes.quantize.algorithms.search`."""

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "moments"

    def refusal(self, stored: Format) -> str | None:
        return None if isinstance(stored, Scaled) else NEEDS_SCALES

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled) and stats is not None
        if not stats.count:
            return stored.encode(weight)
        return _pack(stored, weight, search.search_steps(jnp.asarray(weight), jnp.asarray(_importance(stats)), stored))


@final
@dataclasses.dataclass(frozen=True)
class Hqq(Method):
    """Half-quadratic quantization, without calibration: `xlathe.passes.quantize.algorithms.hqq`."""

    def refusal(self, stored: Format) -> str | None:
        return None if isinstance(stored, Scaled) else NEEDS_SCALES

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled)
        return _pack(stored, weight, hqq.hqq(jnp.asarray(weight), stored))


@final
@dataclasses.dataclass(frozen=True)
class Clip(Method):
    """AWQ's search for ranges (its scales are the pass `AwqScales`): `xlathe.passes.quantize.algorithms.awq`."""

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    def refusal(self, stored: Format) -> str | None:
        return None if isinstance(stored, Scaled) else NEEDS_SCALES

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled) and stats is not None and stats.gram is not None
        if not stats.count:
            return stored.encode(weight)
        return _pack(stored, weight, awq.clip_ranges(jnp.asarray(weight), jnp.asarray(stats.gram, jnp.float32), stored))


@final
@dataclasses.dataclass(frozen=True)
class Gptq(Method):
    """The error of a column is made good by those not yet rounded: `xlathe.passes.quantize.algorithms.gptq`.

    act_order: columns with the largest activations first. search: scales as `Search` chooses them; else they just reach
    the largest weights.
    """

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    act_order: bool = True
    search: bool = True

    def refusal(self, stored: Format) -> str | None:
        return None if isinstance(stored, Scaled) else NEEDS_SCALES

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled) and stats is not None and stats.gram is not None
        if not stats.count:
            return stored.encode(weight)
        array = jnp.asarray(weight)
        steps = stored.fit(array)
        if self.search:
            steps = search.search_steps(array, jnp.asarray(_importance(stats)), stored)
        try:
            levels, _ = gptq.gptq(array, stats.gram, stored, steps, act_order=self.act_order)
        except PassError as error:
            raise PassError(f"quantize: {name}: {error}") from None
        return stored.pack(levels, steps)
