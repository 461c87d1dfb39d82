"""Methods that set single weights to zero; they go through a model as methods of rounding do (`Quantize(method=)`).

Weights are kept in 16 bits, zeros among them. A product takes no less time for them: XLA has no sparse products.
"""

import abc
import dataclasses
from typing import ClassVar, Literal, final

import numpy as np

from xlathe.errors import OptionError, PassError
from xlathe.passes.prune.algorithms.magnitude import magnitude
from xlathe.passes.prune.algorithms.sparsegpt import sparsegpt
from xlathe.passes.prune.algorithms.sparsity import Sparsity
from xlathe.passes.prune.algorithms.wanda import wanda
from xlathe.passes.quantize.method import WeightMethod
from xlathe.stats import InputStats
from xlathe.storage import Format
from xlathe.storage.cast import Cast


@dataclasses.dataclass(frozen=True)
class Sparse(WeightMethod):
    """Sets weights to zero. sparsity: the fraction of each weight, above 0 and below 1.

    keep, of: or at most `keep` of every `of` successive inputs of an output stay (2 of 4), and `sparsity` is not read.
    What calibration never reached loses its smallest weights. Raises OptionError for values out of range, PassError
    for weights that such groups do not divide.
    """

    sparsity: float = 0.5
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, float) or not 0 < self.sparsity < 1:
            raise OptionError(f"{self}: sparsity is a fraction above 0 and below 1, found {self.sparsity!r}")
        counts = type(self.keep) is int and type(self.of) is int
        if not counts or not (0 < self.keep < self.of or self.keep == self.of == 0):
            raise OptionError(f"{self}: expected 0 < keep < of, as in 2 of 4, found {self.keep!r} of {self.of!r}")

    @final
    def refusal(self, stored: Format) -> str | None:
        return None if isinstance(stored, Cast) else "zeros are kept among bf16 or f16"

    @final
    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        if self.of and weight.shape[1] % self.of:
            raise PassError(f"quantize: {name}: {weight.shape[1]} inputs are no multiple of {self.of}")
        how = Sparsity(1 - self.keep / self.of, self.keep, self.of) if self.of else Sparsity(self.sparsity)
        if stats is None or not stats.count:
            return stored.encode(magnitude(weight, how))
        try:
            return stored.encode(np.asarray(self.zeroed(weight, how, stats), np.float32))
        except PassError as error:
            raise PassError(f"quantize: {name}, calibrated on {int(stats.count)} tokens: {error}") from None

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
    """The weights behind make good for those that go: `xlathe.passes.prune.algorithms.sparsegpt`."""

    statistics: ClassVar[Literal["none", "moments", "gram"]] = "gram"

    def zeroed(self, weight: np.ndarray, how: Sparsity, stats: InputStats) -> np.ndarray:
        assert stats.gram is not None
        return np.asarray(sparsegpt(weight, stats.gram, how)[0])
