"""Methods that set single weights to zero; they go through a model as methods of rounding do (`Quantize(method=)`).

Weights are kept in 16 bits, zeros among them, or without their zeros by a scheme that says which or how many these are
(`bf16:2of4`, `int4:g128,50%`). A product takes no less time for them: XLA has no sparse products.
"""

import abc
import dataclasses
import math
from typing import ClassVar, Literal, final

import numpy as np

from xlathe.errors import OptionError, PassError
from xlathe.passes.prune.algorithms.magnitude import magnitude
from xlathe.passes.prune.algorithms.sparsegpt import sparsegpt, sparsegpt_rounded
from xlathe.passes.prune.algorithms.sparsity import Sparsity
from xlathe.passes.prune.algorithms.wanda import wanda
from xlathe.passes.quantize.method import WeightMethod
from xlathe.stats import InputStats
from xlathe.storage import Format, Masked, Scaled, Scattered
from xlathe.storage.cast import Cast


@dataclasses.dataclass(frozen=True)
class Sparse(WeightMethod):
    """Sets weights to zero. sparsity: the fraction of each weight, above 0 and below 1; one half where nothing says.

    keep, of: or at most `keep` of every `of` successive inputs of an output stay (2 of 4), and `sparsity` is left out.
    A scheme that leaves zeros out decides in place of all three. What calibration never reached loses its smallest
    weights.
    Raises OptionError for values out of range, PassError for weights that such groups do not divide.
    """

    sparsity: float | None = None
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if self.sparsity is not None and not (isinstance(self.sparsity, float) and 0 < self.sparsity < 1):
            raise OptionError(f"{self}: sparsity is a fraction above 0 and below 1, found {self.sparsity!r}")
        counts = type(self.keep) is int and type(self.of) is int
        if not counts or not (0 < self.keep < self.of or self.keep == self.of == 0):
            raise OptionError(f"{self}: expected 0 < keep < of, as in 2 of 4, found {self.keep!r} of {self.of!r}")
        if self.of and self.sparsity is not None:
            raise OptionError(f"{self}: {self.keep} of {self.of} says how many stay; leave out sparsity")

    def refusal(self, stored: Format) -> str | None:
        if isinstance(stored, Cast):
            return None
        if not isinstance(stored, Masked | Scattered):
            return "zeros are kept among bf16 or f16, or left out, as in int4:g32,2of4 or bf16:50%"
        groups = (stored.keep, stored.of) if isinstance(stored, Masked) else (0, 0)
        alike = self.sparsity is None or math.isclose(self.sparsity, stored.sparsity)
        if (self.keep, self.of) in ((0, 0), groups) and alike:
            return None
        return f"{stored} says what is zero, {stored.sparsity:.6g} of the weights; leave out sparsity, keep and of"

    def by_rows(self, stored: Format) -> bool:
        return False  # scores of a matrix are sorted at once

    @final
    def zeros(self, stored: Format) -> float:
        return self._sparsity(stored).fraction

    def _sparsity(self, stored: Format) -> Sparsity:
        if isinstance(stored, Scattered):
            return Sparsity(stored.sparsity)
        keep, of = (stored.keep, stored.of) if isinstance(stored, Masked) else (self.keep, self.of)
        return Sparsity(1 - keep / of, keep, of) if of else Sparsity(self.sparsity or 0.5)

    @final
    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        how = self._sparsity(stored)
        if how.of and weight.shape[1] % how.of:
            raise PassError(f"quantize: {name}: {weight.shape[1]} inputs are no multiple of {how.of}")
        if stats is None or not stats.count:
            return stored.encode(magnitude(weight, how))
        try:
            return self.parts(weight, stored, how, stats)
        except PassError as error:
            raise PassError(f"quantize: {name}, calibrated on {int(stats.count)} tokens: {error}") from None

    def parts(self, weight: np.ndarray, stored: Format, how: Sparsity, stats: InputStats) -> tuple[np.ndarray, ...]:
        """Returns the parts of a weight float32 [n, k] with zeros; stats: of some tokens."""
        return stored.encode(np.asarray(self.zeroed(weight, how, stats), np.float32))

    @abc.abstractmethod
    def zeroed(self, weight: np.ndarray, how: Sparsity, stats: InputStats) -> np.ndarray:
        """Returns a weight float32 [n, k] with zeros; stats: of some tokens."""


@final
@dataclasses.dataclass(frozen=True)
class Magnitude(Sparse):
    """The smallest weights, without calibration: `xlathe.passes.prune.algorithms.magnitude`."""

    def zeroed(self, weight: np.ndarray, how: Sparsity, stats: InputStats) -> np.ndarray:
        return magnitude(weight, how)


@final
@dataclasses.dataclass(frozen=True)
class Wanda(Sparse):
    """Those with the smallest |w| ||x|| of an output: `xlathe.passes.prune.algorithms.wanda`."""

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"  # of x behind sparse weights, as published

    def zeroed(self, weight: np.ndarray, how: Sparsity, stats: InputStats) -> np.ndarray:
        return wanda(weight, stats.sum_squares, how)


@final
@dataclasses.dataclass(frozen=True)
class SparseGpt(Sparse):
    """The weights behind make good for those that go: `xlathe.passes.prune.algorithms.sparsegpt`.

    With levels they make good for rounding too, column by column; scales just reach what is kept without rounding.
    """

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    def refusal(self, stored: Format) -> str | None:
        if isinstance(stored, Scaled):
            return "a zero point may leave no zero" if stored.zero else None
        return super().refusal(stored)

    def by_rows(self, stored: Format) -> bool:
        return self._sparsity(stored).of > 0

    def parts(self, weight: np.ndarray, stored: Format, how: Sparsity, stats: InputStats) -> tuple[np.ndarray, ...]:
        dense = stored.dense if isinstance(stored, Masked | Scattered) else stored
        if not isinstance(dense, Scaled):
            return super().parts(weight, stored, how, stats)
        assert stats.gram is not None
        swept, grid = sparsegpt_rounded(weight, stats.gram, how, dense)
        values, levels = np.asarray(swept), np.asarray(grid.levels(swept))
        if isinstance(stored, Masked | Scattered):
            return stored.pack(levels, values, grid.steps)
        return dense.pack(levels, grid.steps)

    def zeroed(self, weight: np.ndarray, how: Sparsity, stats: InputStats) -> np.ndarray:
        assert stats.gram is not None
        return np.asarray(sparsegpt(weight, stats.gram, how)[0])
