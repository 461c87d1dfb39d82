"""AutoRound on what a section of the model puts out."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.passes.quantize.algorithms import autoround
from xlathe.passes.quantize.calibrated import NO_LEVELS, Gptq
from xlathe.passes.quantize.method import Initial, SectionMethod
from xlathe.stats import InputStats
from xlathe.storage import Format, Scaled, Steps
from xlathe.storage.elements import INTEGERS

if TYPE_CHECKING:
    from xlathe.passes.quantize.section_task import SectionTask

ROWS = 8
"""Calibration rows a step, as published."""


@final
@dataclasses.dataclass(frozen=True)
class AutoRound(SectionMethod):
    """Signed gradient descent on rounding and clipping: `xlathe.passes.quantize.algorithms.autoround`.

    The loss is the squared error of what a section puts out, of all its weights together, on what the quantized
    sections before it make. steps: of the descent. gptq: it starts from the weights and scales that GPTQ rounds; else,
    as published, from the trained weights and scales that just reach the largest.
    """

    steps: int = autoround.STEPS
    gptq: bool = True

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise OptionError(f"auto_round: steps={self.steps!r}: expected a positive number")

    def refusal(self, stored: Format) -> str | None:
        if not isinstance(stored, Scaled):
            return NO_LEVELS
        if stored.element not in INTEGERS:
            return "what it learns is added to whole numbers, which this format does not have"
        return None

    def initialize(self, name: str, weight: np.ndarray, stored: Format, stats: InputStats) -> Initial:
        assert isinstance(stored, Scaled)
        if self.gptq:
            found, steps = Gptq().start(name, weight, stored, stats)
            return Initial(stored.pack(found.levels, steps), found.moved, steps)
        steps = stored.fit(jnp.asarray(weight))
        return Initial(stored.encode(weight), jnp.asarray(weight), steps)

    def __call__(self, task: "SectionTask") -> dict[str, tuple[np.ndarray, ...]]:
        formats = [encode.scheme.stored for encode in task.encoders.values()]

        def fit(
            initial: Sequence[tuple[jax.Array, Steps]], data: Any, order: jax.Array
        ) -> list[tuple[jax.Array, Steps]]:
            weights = [
                (weight, autoround.ranges_of(steps, stored), stored)
                for (weight, steps), stored in zip(initial, formats, strict=True)
                if isinstance(stored, Scaled)  # others are refused
            ]

            def rounded(tuned: Sequence[autoround.Tuned]) -> list[jax.Array]:
                each = zip(weights, tuned, strict=True)
                return [autoround.stands_for(w, ranges, own, stored) for (w, ranges, stored), own in each]

            def slope(tuned: Sequence[autoround.Tuned], step: jax.Array) -> tuple[jax.Array, Any]:
                matrices, back = jax.vjp(rounded, tuned)
                loss, gradient = task.slope(matrices, data, order[step])
                return loss, back(gradient)[0]

            start = [autoround.start(weight, ranges) for weight, ranges, _ in weights]
            best, _ = autoround.tune(start, slope, self.steps)
            each = zip(weights, best, strict=True)
            return [autoround.choose(w, ranges, own, stored) for (w, ranges, stored), own in each]

        initial = [(jnp.asarray(each.weight), each.steps) for each in task.initial.values()]
        found = task.run(fit, initial, task.data, _order(task.count, self.steps, task.seed))
        packed = {}
        for name, stored, (levels, steps) in zip(task.encoders, formats, found, strict=True):
            assert isinstance(stored, Scaled)
            packed[name] = stored.pack(levels, steps)
        return packed


def _order(count: int, steps: int, seed: int) -> np.ndarray:
    """Returns the rows of each step, int32 [steps, ROWS], drawn without repetition; all of them where there are few."""
    rows = np.tile(np.arange(count, dtype=np.int32), (steps, 1))
    if count <= ROWS:
        return rows
    return np.random.default_rng(seed).permuted(rows, axis=1)[:, :ROWS]
