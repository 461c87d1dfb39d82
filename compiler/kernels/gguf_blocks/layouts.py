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
    """A type of GGUF files: consecutive numbers of a row that make a block, the bytes it takes, and where among them
    float16 lie."""

    name: str
    numbers: int
    bytes: int
    halves: tuple[int, ...]

    def check(self, wrong: int) -> None:
        """Raises FloatingPointError for what `wrong`, of NOT_FINITE and TOO_LARGE, says."""
        if wrong & NOT_FINITE:
            raise FloatingPointError("expected finite numbers, found NaN or infinity")
        if wrong & TOO_LARGE:
            raise FloatingPointError(f"expected numbers that fit {self.name}, found larger ones")


LAYOUTS: Final[Mapping[str, Layout]] = {
    name: Layout(name, numbers, size, halves)
    for name, numbers, size, halves in (
        ("Q4_0", 32, 18, (0,)),
        ("Q4_1", 32, 20, (0, 2)),
        ("Q5_0", 32, 22, (0,)),
        ("Q5_1", 32, 24, (0, 2)),
        ("Q8_0", 32, 34, (0,)),
        ("IQ4_NL", 32, 18, (0,)),
        ("Q2_K", 256, 84, (80, 82)),
        ("Q3_K", 256, 110, (108,)),
        ("Q4_K", 256, 144, (0, 2)),
        ("Q5_K", 256, 176, (0, 2)),
        ("Q6_K", 256, 210, (208,)),
        ("IQ4_XS", 256, 136, (0,)),
    )
}
