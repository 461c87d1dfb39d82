"""Methods of rounding by the algorithms of `algorithms/`: each hands it the weight and what calibration saw."""

import dataclasses
import functools
from typing import ClassVar, Literal, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import PassError
from xlathe.passes.quantize.algorithms import autoround, awq, gptq, hqq, search
from xlathe.passes.quantize.algorithms.blocks import output_error
from xlathe.passes.quantize.method import Method
from xlathe.stats import InputStats
from xlathe.storage import Format, Scaled, Steps
from xlathe.storage.elements import INTEGERS

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


@final
@dataclasses.dataclass(frozen=True)
class AutoRound(Method):
    """Signed gradient descent on rounding and clipping: `xlathe.passes.quantize.algorithms.autoround`.

    The loss is the squared error of the weight's own products; the published one is that of a whole layer's output.
    """

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    steps: int = autoround.STEPS

    def refusal(self, stored: Format) -> str | None:
        if not isinstance(stored, Scaled) or stored.element not in INTEGERS:
            return "what it learns is added to whole numbers, which this format does not have"
        return None

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        assert isinstance(stored, Scaled) and stats is not None and stats.gram is not None
        if not stats.count:
            return stored.encode(weight)
        array, gram = jnp.asarray(weight), jnp.asarray(stats.gram / stats.count, jnp.float32)
        tuned, _ = autoround.tune(
            autoround.start(array, stored), functools.partial(_products_error, stored), array, gram, steps=self.steps
        )
        return stored.pack(*autoround.choose(array, tuned, stored))


def _products_error(
    stored: Scaled, tuned: autoround.Tuned, step: jax.Array, weight: jax.Array, gram: jax.Array
) -> jax.Array:
    return output_error(weight, autoround.stands_for(weight, tuned, stored), gram)
