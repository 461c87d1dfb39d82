"""The types that llama.cpp gives the tensors of a file: a mix of a base type and wider ones, by name, place and shape.

As llama.cpp's src/llama-quant.cpp (llama_model_quantize) has it, for the architectures that `write.py` writes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from xlathe.models.formats.gguf.container import tensor_size

Type = GGMLQuantizationType
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by name, outermost axis first."""

MIXES: Final[Mapping[str, tuple[Type, LlamaFileType]]] = {
    "F32": (Type.F32, LlamaFileType.ALL_F32),
    "F16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q6_K": (Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "Q5_K_M": (Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "Q5_K_S": (Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "Q5_1": (Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "Q5_0": (Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "Q4_K_M": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "Q4_K_S": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "Q4_1": (Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "Q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "IQ4_NL": (Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
    "IQ4_XS": (Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
    "Q3_K_L": (Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_L),
    "Q3_K_M": (Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
    "Q3_K_S": (Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "Q2_K": (Type.Q2_K, LlamaFileType.MOSTLY_Q2_K),
    "Q2_K_S": (Type.Q2_K, LlamaFileType.MOSTLY_Q2_K_S),
}
"""By name: the base type, and the number that the file says."""
# What llama.cpp only computes with in float32, beside norms and biases.
FLOAT32: Final = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "_norm.weight")
EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT: Final = "output.weight"
ROLES: Final[Mapping[str, str]] = {  # the first that is in a name says what a tensor is for
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_output.weight": "output",
    "ffn_down": "down",
}
NARROWER: Final[Mapping[Type, Type]] = {  # in blocks of 32, where rows are not whole blocks of 256
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a mix depends on beside names and shapes: the architecture's name in GGUF, and numbers of its metadata."""

    architecture: str
    layers: int
    heads: int
    key_value_heads: int
    experts: int = 0

    @property
    def queries(self) -> int:
        """Query heads that share a key."""
        return self.heads // self.key_value_heads if self.key_value_heads else 0

    @property
    def is_70b(self) -> bool:
        shared = self.heads != self.key_value_heads
        return self.layers == 80 and (self.architecture == "qwen2" or (self.architecture == "llama" and shared))


def types_of(mix: str, shapes: Shapes, counts: Counts, importance: bool = False) -> dict[str, Type]:
    """Returns the type of each tensor. importance: whether the errors are weighed by an importance matrix."""
    base, _ = MIXES[mix]
    ordered = sorted(shapes, key=_place)
    values = sum(_role(name) == "value" for name in ordered)
    seen = {"value": 0, "down": 0}
    types = {}
    for name in ordered:
        if not _is_matrix(name, shapes[name]):
            types[name] = Type.F32
            continue
        role = _role(name)
        if role == "embedding" and OUTPUT not in shapes:
            role = "head"
        found = base
        if GGML_QUANT_SIZES[base][0] > 1:
            down = _place(name)[0] if counts.experts > 1 else seen["down"]
            of = values if role == "value" else counts.layers
            place = seen["value"] if role == "value" else down
            found = _type(mix, role, place, of, shapes[name][-1], counts, importance)
            if role in seen:
                seen[role] += 1
        types[name] = _fitting(found, shapes[name][-1])
    return {name: types[name] for name in shapes}


def bits_per_weight(shapes: Shapes, types: Mapping[str, Type]) -> float:
    """Returns the bits of all tensors over their numbers."""
    size = sum(tensor_size(shape, types[name]) for name, shape in shapes.items())
    return 8 * size / sum(math.prod(shape) for shape in shapes.values())


def _place(name: str) -> tuple[int, str]:
    """Returns the layer, -1 for none, and the name: the order in which llama.cpp counts."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def _role(name: str) -> str:
    if name == OUTPUT:
        return "head"
    if name in EMBEDDINGS:
        return "embedding"
    return next((role for part, role in ROLES.items() if part in name), "other")


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return math.prod(shape[:-1]) > 1 and name.endswith(".weight") and not name.endswith(FLOAT32)


def _fitting(type: Type, columns: int) -> Type:
    """Returns the type, or one whose blocks divide the rows."""
    if columns % GGML_QUANT_SIZES[type][0]:
        type = NARROWER.get(type, type)
    return Type.F16 if columns % GGML_QUANT_SIZES[type][0] else type


def _type(mix: str, role: str, i: int, n: int, columns: int, counts: Counts, importance: bool) -> Type:
    """Returns the type of a tensor that is the i-th of n in its role, before its shape is looked at."""
    base, _ = MIXES[mix]
    match role:
        case "head":
            whole = columns % GGML_QUANT_SIZES[base][0] == 0
            return Type.Q6_K if whole and base is not Type.Q8_0 else Type.Q8_0
        case "value":
            return Type.Q8_0 if counts.experts == 8 else _value(mix, i, n, counts)
        case "key":
            return Type.Q8_0 if counts.experts == 8 else base
        case "down":
            return next(_down(mix, i, n, importance), base)
        case "output" if counts.experts == 8:
            return Type.Q5_K if mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS") else base
        case "output":
            return {"Q2_K": Type.Q3_K, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K}.get(mix, base)
    return base


def _value(mix: str, i: int, n: int, counts: Counts) -> Type:
    base, _ = MIXES[mix]
    shared = counts.queries >= 4
    found = base
    match mix:
        case "Q2_K":
            found = Type.Q4_K if shared else Type.Q3_K
        case "Q2_K_S" if shared:
            found = Type.Q4_K
        case "Q3_K_M":
            found = Type.Q5_K if i < 2 else Type.Q4_K
        case "Q3_K_L":
            found = Type.Q5_K
        case "Q4_K_M" | "Q5_K_M" if _has_more_bits(i, n):
            found = Type.Q6_K
        case "Q4_K_S" if i < 4:
            found = Type.Q5_K
        case "IQ4_NL" | "IQ4_XS" if shared:
            found = Type.Q5_K
    return Type.Q5_K if counts.is_70b and found in (Type.Q3_K, Type.Q4_K) else found


def _down(mix: str, i: int, n: int, importance: bool) -> Iterator[Type]:
    """Yields another type than the base where the projection down has one."""
    early = i < n // 8
    match mix:
        case "Q2_K":
            yield Type.Q3_K
        case "Q2_K_S" if early:
            yield Type.Q4_K
        case "Q3_K_M":
            yield Type.Q5_K if i < n // 16 else Type.Q4_K
        case "Q3_K_L":
            yield Type.Q5_K
        case "Q4_K_M" | "Q5_K_M" if _has_more_bits(i, n):
            yield Type.Q6_K
        case "Q4_K_S" if early:
            yield Type.Q5_K
        case "IQ4_NL" | "IQ4_XS" if early and not importance:
            yield Type.Q5_K
        case "Q4_0" if early and importance:
            yield Type.Q4_1
        case "Q5_0" if early and importance:
            yield Type.Q5_1


def _has_more_bits(i: int, n: int) -> bool:
    """Says whether the i-th of n layers is one of the half that has more bits: the ends, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
