"""GPTQ's layout (AutoGPTQ, GPTQModel), for writing: codes packed along inputs, 32 bits a word.

A linear module has `qweight` int32 [k * bits / 32, n], `qzeros` int32 [groups, n * bits / 32], `scales` float16
[groups, n] and `g_idx` int32 [k], the group of each input. Weights are (code - zero) * scale. The first version of the
format holds zero points less one, which has no place for 0; `gptq_v2` holds them as they are.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.layouts.bits import WORD, count_words, pack, to_words
from xlathe.models.formats.layouts.integers import by_group, derived, exactly, stored_of, to_stream, zeros_of
from xlathe.models.formats.layouts.layout import Layout
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import Scaled, parse_format
from xlathe.storage.elements import INTEGERS

BLOCK = re.compile(r".*?\.\d+\.(.+)")
"""Modules of a layer, and their names in it."""


@final
@dataclasses.dataclass(frozen=True)
class Gptq(Layout):
    """name: `gptq` or `gptq_v2`, as `checkpoint_format` says."""

    name: str

    def refusal(self, module: str, packed: Packed, n: int, k: int) -> str | None:
        if reason := outside(module) or misfit(packed, tuple(INTEGERS)):
            return reason
        return uneven(INTEGERS[stored_of(packed).element], outputs=n, inputs=k)

    def tensors(self, module: str, packed: Packed, n: int, k: int) -> Mapping[str, Tensor]:
        stored, parts = stored_of(packed), packed.parts
        bits, group = INTEGERS[stored.element], stored.columns or k
        zeros = zeros_of(stored, parts["scale"], parts.get("zero"))
        groups = zeros.shape[1]

        def qzeros(zero: np.ndarray) -> np.ndarray:
            return pack(self._kept_zeros(f"{module}.qzeros", zero).T, bits)

        def scales(scale: np.ndarray) -> np.ndarray:
            return exactly(f"{module}.scales", by_group(stored, scale).T, np.float16)

        codes = derived((k * bits // WORD, n), np.int32, lambda c: to_words(to_stream(c)).T, parts["codes"])
        return {
            "qweight": codes,
            "qzeros": derived((groups, count_words(n, bits)), np.int32, qzeros, zeros),
            "scales": derived((groups, n), np.float16, scales, parts["scale"]),
            "g_idx": Tensor((k,), np.dtype(np.int32), lambda: np.arange(k, dtype=np.int32) // np.int32(group)),
        }

    def _kept_zeros(self, name: str, zero: np.ndarray) -> np.ndarray:
        if self.name == "gptq_v2":
            return zero
        if (zero == 0).any():
            raise CheckpointError(
                f"{name}: a zero point of 0 has no place in gptq, which holds it less one; gptq_v2 has"
            )
        return zero - np.uint8(1)

    def settings(self, modules: Mapping[str, Packed], plain: Sequence[str]) -> dict[str, Any]:
        stored = the_one(modules, self.name)
        left_out = [module for module in plain if BLOCK.fullmatch(module)]
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": INTEGERS[stored.element],
            "group_size": stored.columns or -1,
            "sym": not stored.zero,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            **(_partial(self.name, list(modules), left_out) if left_out else {}),
        }


def _partial(layout: str, modules: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """Returns the settings by which readers leave modules of layers in floats: vLLM and GPTQModel by `dynamic`,
    transformers by the ends of names that it quantizes, in whichever layer."""
    quantized = list(dict.fromkeys(_within(module) for module in modules))
    for module in left_out:
        if module.endswith(tuple(quantized)):
            raise CheckpointError(
                f"{layout}: {module} is in floats, and its like in another layer is quantized, which transformers "
                "cannot be told; compressed-tensors and awq name such modules, or a rule leaves it so in every layer"
            )
    return {
        "modules_in_block_to_quantize": [quantized],
        "dynamic": {f"-:^{re.escape(module)}$": {} for module in left_out},
    }


def _within(module: str) -> str:
    found = BLOCK.fullmatch(module)
    assert found is not None, module
    return found[1]


def outside(module: str) -> str | None:
    """Says what is expected of a module of no layer, as a head is; None where it is of one."""
    if BLOCK.fullmatch(module):
        return None
    return "its readers take a head of floats; a rule ('head/kernel', 'none') leaves it as it is"


def misfit(packed: Packed, elements: Sequence[str]) -> str | None:
    """Says what is expected of whole numbers with float16 scales; None where it is there."""
    stored, listed = parse_format(packed.format), ", ".join(elements)
    if not isinstance(stored, Scaled) or stored.element not in elements:
        return f"expected {listed}"
    if stored.rows != 1:
        return "expected scales by group or channel"
    if stored.zero not in ("", "u8"):
        return "expected no zero points, or whole ones (asym)"
    if stored.scale not in ("f16", "bf16"):
        return "expected scales of float16 (s=f16)"
    return "expected activations as they are" if packed.activations else None


def uneven(bits: int, **sizes: int) -> str | None:
    """Says which axis of a weight does not fill whole words."""
    for what, size in sizes.items():
        if size * bits % WORD:
            return f"expected {what} that fill whole words of {WORD} bits, found {size} of {bits} bits"
    return None


def the_one(modules: Mapping[str, Packed], layout: str) -> Scaled:
    """Returns the storage format that all modules have but for the type of scales; raises CheckpointError for more."""
    found: dict[Scaled, str] = {}
    for module, packed in modules.items():
        found.setdefault(dataclasses.replace(stored_of(packed), scale="f16"), module)
    if len(found) > 1:
        told = " and ".join(f"{module} in {stored}" for stored, module in list(found.items())[:2])
        raise CheckpointError(f"{layout} holds one scheme, found {told}; compressed-tensors holds several")
    return next(iter(found))
