"""AWQ's layout GEMM (AutoAWQ), for writing: 4-bit codes of eight outputs in a word, the even ones first.

A linear module has `qweight` int32 [k, n / 8], `qzeros` int32 [groups, n / 8] and `scales` float16 [groups, n]. Weights
are (code - zero) * scale; there always are zero points.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from xlathe.models.formats.layouts.bits import pack, unpack
from xlathe.models.formats.layouts.gptq import misfit, outside, the_one, uneven
from xlathe.models.formats.layouts.integers import by_group, derived, exactly, stored_of, unpack_levels, zeros_of
from xlathe.models.formats.layouts.layout import Layout
from xlathe.safetensors_file import Packed, Tensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lie in a word, from the lowest bits up."""


@final
@dataclasses.dataclass(frozen=True)
class Awq(Layout):
    """AWQ has one form that is written."""

    def refusal(self, module: str, packed: Packed, n: int, k: int) -> str | None:
        return outside(module) or misfit(packed, ("int4",)) or uneven(BITS, outputs=n)

    def tensors(self, module: str, packed: Packed, n: int, k: int) -> Mapping[str, Tensor]:
        stored, parts = stored_of(packed), packed.parts
        zeros = zeros_of(stored, parts["scale"], parts.get("zero"))
        groups = zeros.shape[1]

        def qweight(codes: np.ndarray) -> np.ndarray:
            return interleave(unpack_levels(stored, codes, k).T)

        def scales(scale: np.ndarray) -> np.ndarray:
            return exactly(f"{module}.scales", by_group(stored, scale).T, np.float16)

        return {
            "qweight": derived((k, n // len(ORDER)), np.int32, qweight, parts["codes"]),
            "qzeros": derived((groups, n // len(ORDER)), np.int32, lambda zero: interleave(zero.T), zeros),
            "scales": derived((groups, n), np.float16, scales, parts["scale"]),
        }

    def settings(self, modules: Mapping[str, Packed], plain: Sequence[str]) -> dict[str, Any]:
        stored = the_one(modules, "awq")
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": stored.columns or -1,
            "zero_point": True,
            "modules_to_not_convert": list(plain) or None,
        }


def interleave(codes: np.ndarray) -> np.ndarray:
    """Packs uint8 [m, n] below 16 into int32 [m, n / 8]."""
    eights = codes.reshape(len(codes), -1, len(ORDER))[..., list(ORDER)]
    return pack(eights.reshape(codes.shape), BITS)


def straighten(words: np.ndarray) -> np.ndarray:
    """Undoes `interleave`."""
    codes = unpack(words, BITS, len(ORDER) * words.shape[1])
    return codes.reshape(len(codes), -1, len(ORDER))[..., np.argsort(ORDER)].reshape(codes.shape)
