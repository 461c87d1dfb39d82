"""Round to nearest: the plainest quantizer, and the one every other is measured against."""

import dataclasses
from typing import final

import numpy as np

from xlathe.passes.quantize.method import WeightMethod
from xlathe.stats import InputStats
from xlathe.storage import Format


@final
@dataclasses.dataclass(frozen=True)
class Rtn(WeightMethod):
    """Scales that just reach the largest weight of a block, and for each weight the nearest level."""

    def __call__(
        self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None
    ) -> tuple[np.ndarray, ...]:
        return stored.encode(weight)
