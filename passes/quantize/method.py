"""What a method of rounding is given, and what it returns.

A method is a frozen dataclass whose fields are its options; its text form is a pass's, `gptq{act_order=False}`, and
it has a line in `methods.py`. Most see a weight at a time (`WeightMethod`), some all of a section (`SectionMethod`).
The former is called once a weight, when the weight is prepared, and plans nothing:

    parts = method(name, weight, stored, stats)

* `name`: the weight's, for messages alone.
* `weight`: NumPy float32 [n, k], finite; the method may not write to it. y = x w^T, so a row is an output channel.
* `stored`: the storage format (`xlathe.storage.Format`). `stored.encode(weight)` is plain rounding in any format. A
  `Scaled` one also has the grid: `fit`, `spread`, `nearest`, `values` and `pack`, which `compiler/storage/scaled.py`
  explains.
* `stats`: `xlathe.stats.InputStats` of x [tokens, k] in the order of the weight's columns, with `gram` where the method
  asks for it; None where `statistics` is "none". `stats.count` may be 0 for an expert that no token chose: the method
  rounds to nearest then.
* returns the parts in the order and with the shapes and dtypes of `stored.parts(n, k)`: `stored.pack(levels, steps)`
  makes them of levels and steps.
"""

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, final

import jax
import numpy as np

from xlathe.pass_text import print_pass
from xlathe.stats import InputStats
from xlathe.storage import Format, Steps

if TYPE_CHECKING:
    from xlathe.passes.quantize.section_task import SectionTask


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):  # noqa: B024  # what its two kinds share
    """A way to choose codes and scales. statistics: of the activations, what it needs to know.

    `moments`: sums and largest values of each column; `gram`: these and x^T x; `section`: all that, and what a section
    of the model puts out. All but `none` take calibration batches; `gram` and `section` see what the quantized weights
    before make.
    """

    statistics: ClassVar[Literal["none", "moments", "gram", "section"]] = "none"

    def refusal(self, stored: Format) -> str | None:
        """Says why the method cannot round to a format, before anything runs; None where it can."""
        return None

    def by_rows(self, stored: Format) -> bool:
        """Whether a weight's rows go some at a time, where more would not fit; else what is held grows with all."""
        return True

    def zeros(self, stored: Format) -> float:
        """Returns the fraction of weights that become zero, others than by rounding."""
        return stored.sparsity

    @final
    def __str__(self) -> str:
        return print_pass(self)


@dataclasses.dataclass(frozen=True)
class WeightMethod(Method):
    """A method that sees one weight at a time."""

    @abc.abstractmethod
    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        """Returns the parts of a weight float32 [n, k]."""


@dataclasses.dataclass(frozen=True)
class Initial:
    """What a weight of a section is at first. parts: as stored; weight [n, k], steps: what these are nearest to."""

    parts: tuple[np.ndarray, ...]
    weight: jax.Array
    steps: Steps


@dataclasses.dataclass(frozen=True)
class SectionMethod(Method):
    """A method that begins with one weight after the other, and then sees all weights of a section at once.

    What calibration never reached is rounded to nearest.
    """

    statistics: ClassVar[Literal["none", "moments", "gram", "section"]] = "section"

    @abc.abstractmethod
    def initialize(self, name: str, weight: np.ndarray, stored: Format, stats: InputStats) -> Initial:
        """Returns what a weight float32 [n, k] is at first; stats: of some tokens, with x^T x."""

    @abc.abstractmethod
    def __call__(self, task: "SectionTask") -> dict[str, tuple[np.ndarray, ...]]:
        """Returns the parts of each weight of a section."""
