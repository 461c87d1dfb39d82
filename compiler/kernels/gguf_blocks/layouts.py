"""Sizes of the blocks that can be encoded, and what may be wrong with numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Final

NOT_FINITE: Final = 1
TOO_LARGE: Final = 2
LIMIT: Final = 2.0**30
"""No type holds such numbers, and sums of their squares would be infinite: llama.cpp makes zeros of some silently."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A type of GGUF files: consecutive numbers of a row that make a block, and the bytes it takes."""

    name: str
    numbers: int
    bytes: int

    def check(self, wrong: int) -> None:
        """Raises FloatingPointError for what `wrong`, of NOT_FINITE and TOO_LARGE, says."""
        if wrong & NOT_FINITE:
            raise FloatingPointError("expected finite numbers, found NaN or infinity")
        if wrong & TOO_LARGE:
            raise FloatingPointError(f"expected numbers that fit {self.name}, found larger ones")


LAYOUTS: Final[Mapping[str, Layout]] = {
    name: Layout(name, numbers, size)
    for name, numbers, size in (
        ("Q4_0", 32, 18),
        ("Q4_1", 32, 20),
        ("Q5_0", 32, 22),
        ("Q5_1", 32, 24),
        ("Q8_0", 32, 34),
        ("IQ4_NL", 32, 18),
        ("Q2_K", 256, 84),
        ("Q3_K", 256, 110),
        ("Q4_K", 256, 144),
        ("Q5_K", 256, 176),
        ("Q6_K", 256, 210),
        ("IQ4_XS", 256, 136),
    )
}
