"""The layouts of compressed-tensors (llm-compressor), for writing: packed integers, int8, and floats of 8 bits.

    pack-quantized    weight_packed int32 [n, ceil(k * bits / 32)], weight_scale [n, groups], weight_shape int64 [2],
                      and weight_zero_point int32 [ceil(n * bits / 32), groups] where there are zero points
    int-quantized     weight int8 [n, k], weight_scale; what activations are multiplied with as integers
    float-quantized   weight float8_e4m3fn [n, k], weight_scale

`weight_scale` is [n, 1] by channel and [1] by tensor, [rows, columns] by block. Activations rounded in one step for all
have it as `input_scale` [1].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from xlathe.models.formats.layouts.bits import count_words, pack, to_words
from xlathe.models.formats.layouts.integers import by_group, derived, middle, stored_of, to_stream, unpack_levels
from xlathe.models.formats.layouts.layout import Layout
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import Scaled, parse_format
from xlathe.storage.elements import INTEGERS

PACKED, WHOLE, FLOAT, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
FP8 = "fp8_e4m3"


@final
@dataclasses.dataclass(frozen=True)
class CompressedTensors(Layout):
    """One `config_groups` entry a scheme; the format of each follows from it."""

    def refusal(self, module: str, packed: Packed, n: int, k: int) -> str | None:
        stored = parse_format(packed.format)
        if not isinstance(stored, Scaled) or stored.element not in (*INTEGERS, FP8):
            return f"expected {', '.join(INTEGERS)} or {FP8}"
        if stored.scale not in ("f32", "f16", "bf16"):
            return "expected scales of float32, float16 or bfloat16"
        if stored.zero not in ("", "u8"):
            return "expected no zero points, or whole ones (asym)"
        if packed.activations == "int8":
            return "expected activations as they are, or with one step a token or for all (a=int8_token, int8_static)"
        misfit = _misfit_float if stored.element == FP8 else _misfit_integer
        return misfit(stored, packed.activations)

    def tensors(self, module: str, packed: Packed, n: int, k: int) -> Mapping[str, Tensor]:
        stored, parts = stored_of(packed), packed.parts
        weight = {PACKED: _packed, WHOLE: _whole, FLOAT: _float}[format_of(packed)](stored, parts, n, k)
        scale = parts["scale"]
        shape = scale.shape if stored.columns else (*scale.shape, 1) if stored.rows else (1,)
        given = {"weight_scale": derived(shape, scale.dtype, lambda array: array.reshape(shape), scale)}
        if "input" in parts:
            given["input_scale"] = derived((1,), np.float32, lambda array: array.reshape(1), parts["input"])
        return {**weight, **given}

    def settings(self, modules: Mapping[str, Packed], plain: Sequence[str]) -> dict[str, Any]:
        groups: dict[tuple[Scaled, str | None], list[str]] = {}
        for module, packed in modules.items():
            stored = dataclasses.replace(stored_of(packed), scale="f32")  # the type of scales is in the files
            groups.setdefault((stored, packed.activations), []).append(module)
        formats = list(dict.fromkeys(format_of(packed) for packed in modules.values()))
        one = len(groups) == 1
        return {
            "quant_method": "compressed-tensors",
            "format": formats[0] if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "ignore": list(plain),
            "config_groups": {
                f"group_{i}": _group(stored, activations, ["Linear"] if one else names)
                | ({"format": format_of(modules[names[0]])} if len(formats) > 1 else {})
                for i, ((stored, activations), names) in enumerate(groups.items())
            },
        }


def format_of(packed: Packed) -> str:
    """Returns the format that a weight is written in."""
    if stored_of(packed).element == FP8:
        return FLOAT
    return WHOLE if packed.activations else PACKED


def _misfit_float(stored: Scaled, activations: str | None) -> str | None:
    if stored.rows == 1 and stored.columns:
        return "expected scales by tensor, channel or block"
    return None if activations in (None, "fp8_token", "fp8_static") else "expected activations in fp8"


def _misfit_integer(stored: Scaled, activations: str | None) -> str | None:
    if stored.rows > 1 or (stored.zero and not stored.rows):
        return "expected scales by group or channel"
    if activations and (stored.zero or activations.startswith("fp8")):
        return "expected no zero points, and activations in int8"
    return None


def _packed(stored: Scaled, parts: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
    bits = INTEGERS[stored.element]
    words = derived(
        (n, count_words(k, bits)), np.int32, lambda codes: to_words(to_stream(codes)), parts["codes"]
    )
    found = {
        "weight_packed": words,
        "weight_shape": Tensor((2,), np.dtype(np.int64), lambda: np.array([n, k], np.int64)),
    }
    if stored.zero:
        zero = parts["zero"]
        shape = (count_words(n, bits), zero.shape[1] if stored.columns else 1)
        found["weight_zero_point"] = derived(
            shape, np.int32, lambda array: pack(by_group(stored, array).T, bits).T, zero
        )
    return found


def _whole(stored: Scaled, parts: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
    def levels(codes: np.ndarray) -> np.ndarray:
        return (unpack_levels(stored, codes, k).astype(np.int16) - middle(stored)).astype(np.int8)

    return {"weight": derived((n, k), np.int8, levels, parts["codes"])}


def _float(stored: Scaled, parts: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
    return {"weight": parts["codes"]}


def _group(stored: Scaled, activations: str | None, targets: Sequence[str]) -> dict[str, Any]:
    """Returns one entry of `config_groups`."""
    return {
        "targets": list(targets),
        "weights": _weights(stored),
        "input_activations": _activations(activations) if activations else None,
        "output_activations": None,
    }


def _weights(stored: Scaled) -> dict[str, Any]:
    shared: dict[str, Any] = {"strategy": "channel" if stored.rows else "tensor"}
    if stored.columns:
        block = {"strategy": "block", "block_structure": [stored.rows, stored.columns]}
        shared = block if stored.rows > 1 else {"strategy": "group", "group_size": stored.columns}
    bits, kind = (8, "float") if stored.element == FP8 else (INTEGERS[stored.element], "int")
    return {"num_bits": bits, "type": kind, "symmetric": not stored.zero, "dynamic": False, **shared}


def _activations(activations: str) -> dict[str, Any]:
    kind, _, step = activations.partition("_")
    return {
        "num_bits": 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        "dynamic": step == "token",
        "strategy": "token" if step == "token" else "tensor",
    }
