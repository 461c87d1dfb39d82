"""Rotary position embeddings: Hugging Face's `rope_parameters`, and GGUF's keys and tensors of factors.

The formulas are those of YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024) and Llama 3.1's scaling, as
`transformers.modeling_rope_utils` writes them.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.header import Header

THETA: Final = 10000.0
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
YARN: Final = {
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "extrapolation_factor": "rope.scaling.yarn_ext_factor",
}
# Of the Llama 3 family; a file has the factors that they make, not the settings.
LOW, HIGH, ORIGINALS = 1.0, 4.0, (8192, 4096, 2048, 16384, 32768, 65536, 131072)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of full attention, as `rope_parameters` says, or `rope_theta` and `rope_scaling`."""
    parameters = dict(config.get("rope_parameters") or {})
    if "full_attention" in parameters:
        return {"rope_type": "default", **parameters["full_attention"]}
    scaling = dict(config.get("rope_scaling") or {})
    found = {"rope_theta": config.get("rope_theta", config.get("rotary_emb_base", THETA)), **scaling, **parameters}
    kind = found.pop("type", None)
    return {**found, "rope_type": found.get("rope_type", kind) or "default"}


def read_rope(header: Header, head_dim: int) -> dict[str, Any]:
    """Returns `rope_parameters` of a file."""
    if head_dim < 1:
        raise CheckpointError(f"{header.file.path}: features of a head: expected 1 or more, found {head_dim}")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": header.get("rope.freq_base", float, THETA)}
    turned = header.get("rope.dimension_count", int, head_dim)
    if turned != head_dim:
        found["partial_rotary_factor"] = turned / head_dim
    return {**found, **_read_scaling(header, found["rope_theta"], turned)}


def _read_scaling(header: Header, theta: float, turned: int) -> dict[str, Any]:
    original = header.get("rope.scaling.original_context_length", int)
    if FREQUENCIES in header.file.entries:
        return _llama3_settings(_factors(header, FREQUENCIES, turned), theta, original)
    if LONG in header.file.entries and SHORT in header.file.entries:
        attention = header.get("rope.scaling.attn_factor", float)
        found = {"rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": attention}
        factors = {f"{k}_factor": _factors(header, n, turned).tolist() for k, n in (("long", LONG), ("short", SHORT))}
        return {**{key: value for key, value in found.items() if value is not None}, **factors}
    factor = header.get("rope.scaling.factor", float) or header.get("rope.scale_linear", float)
    kind = header.get("rope.scaling.type", str, "none" if factor in (None, 1) else "linear")
    if kind == "yarn":
        settings = {key: header.get(name, float) for key, name in YARN.items()}
        given = {"factor": factor, "original_max_position_embeddings": original, **settings}
        return {"rope_type": "yarn", **{key: value for key, value in given.items() if value is not None}}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor or 1.0}
    return {}


def write_rope(config: Mapping[str, Any], turned: int) -> dict[str, Any]:
    """Returns the keys of the settings, without the architecture's prefix; `turned` features of a head are rotated."""
    rope = rope_of(config)
    keys: dict[str, Any] = {"rope.dimension_count": turned, "rope.freq_base": float(rope["rope_theta"])}
    match rope["rope_type"]:
        case "default" | "llama3":
            return keys
        case "linear":
            return {**keys, "rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
            given = {name: float(rope[key]) for key, name in YARN.items() if rope.get(key) is not None}
            return {**keys, **scaling, "rope.scaling.original_context_length": _original(rope, config), **given}
        case "longrope" | "su":
            attention = float(rope.get("attention_factor") or _longrope_attention(rope, config))
            found = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": attention}
            return {**keys, **found, "rope.scaling.original_context_length": _original(rope, config)}
        case other:
            raise CheckpointError(
                f"config: rope_type: expected linear, yarn, longrope or llama3, which GGUF has, found {other!r}"
            )


def rope_tensors(config: Mapping[str, Any], turned: int) -> dict[str, np.ndarray]:
    """Returns the factors, float32 [turned / 2], by the names of their tensors."""
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        original = _original(rope, config)
        factors = llama3_factors(rope["rope_theta"], turned, rope["factor"], rope["low_freq_factor"],
                                 rope["high_freq_factor"], original)  # fmt: skip
        return {FREQUENCIES: factors}
    if rope["rope_type"] in ("longrope", "su"):
        return {LONG: np.asarray(rope["long_factor"], np.float32), SHORT: np.asarray(rope["short_factor"], np.float32)}
    return {}


def llama3_factors(theta: float, turned: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Returns what divides each frequency, float32 [turned / 2]: long waves by `factor`, short ones by 1."""
    waves = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _llama3_settings(factors: np.ndarray, theta: float, original: int | None) -> dict[str, Any]:
    """Finds the settings that make the factors; where there are none, LongRoPE with these factors is the same."""
    factor = float(factors.max())
    for length in ORIGINALS if original is None else (original, *ORIGINALS):
        with np.errstate(all="ignore"):  # a damaged file has factors of any kind, which nothing makes
            made = llama3_factors(theta, 2 * len(factors), factor, LOW, HIGH, length)
        if np.allclose(made, factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": length,
            }
    same = factors.tolist()
    return {"rope_type": "longrope", "long_factor": same, "short_factor": same, "attention_factor": 1.0}


def _factors(header: Header, name: str, turned: int) -> np.ndarray:
    entry = header.file.entries[name]
    if entry.shape != (turned // 2,):
        raise CheckpointError(
            f"{header.file.path}: tensor {name!r}: expected the shape {[turned // 2]}, found {list(entry.shape)}"
        )
    return as_tensor(header.file, entry).read()


def _original(rope: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    lengths = (rope, config)
    found = [c["original_max_position_embeddings"] for c in lengths if c.get("original_max_position_embeddings")]
    return int(found[0] if found else config["max_position_embeddings"])


def _longrope_attention(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    original = _original(rope, config)
    scale = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
