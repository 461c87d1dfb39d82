"""AutoRound on what a section of the model puts out."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.passes.quantize.algorithms import autoround
from xlathe.passes.quantize.calibrated import NO_LEVELS
from xlathe.passes.quantize.method import SectionMethod
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
    sections before it make. steps: of the descent.
    """

    steps: int = autoround.STEPS

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise OptionError(f"auto_round: steps={self.steps!r}: expected a positive number")

    def refusal(self, stored: Format) -> str | None:
        if not isinstance(stored, Scaled):
            return NO_LEVELS
        if stored.element not in INTEGERS:
            return "what it learns is added to whole numbers, which this format does not have"
        return None

    def __call__(self, task: "SectionTask") -> dict[str, tuple[np.ndarray, ...]]:
        formats = [_scaled(make.scheme.stored) for make in task.makers.values()]

        def fit(matrices: Sequence[jax.Array], data: Any, order: jax.Array) -> list[tuple[jax.Array, Steps]]:
            def loss(tuned: Sequence[autoround.Tuned], step: jax.Array) -> jax.Array:
                each = zip(matrices, tuned, formats, strict=True)
                return task.error([autoround.stands_for(*weight) for weight in each], data, order[step])

            start = [autoround.start(matrix, stored) for matrix, stored in zip(matrices, formats, strict=True)]
            best, _ = autoround.tune(start, loss, steps=self.steps)
            return [autoround.choose(*weight) for weight in zip(matrices, best, formats, strict=True)]

        matrices = [jnp.asarray(matrix) for matrix in task.matrices.values()]
        found = task.run(fit, matrices, task.data, _order(task.count, self.steps, task.seed))
        named = zip(task.makers, formats, found, strict=True)
        return {name: stored.pack(levels, steps) for name, stored, (levels, steps) in named}


def _scaled(stored: Format) -> Scaled:
    assert isinstance(stored, Scaled)  # others are refused
    return stored


def _order(count: int, steps: int, seed: int) -> np.ndarray:
    """Returns the rows of each step, int32 [steps, ROWS], drawn without repetition; all of them where there are few."""
    rows = np.tile(np.arange(count, dtype=np.int32), (steps, 1))
    if count <= ROWS:
        return rows
    return np.random.default_rng(seed).permuted(rows, axis=1)[:, :ROWS]
