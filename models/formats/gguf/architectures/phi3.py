"""phi3: fused projections, and LongRoPE's two tables of factors."""

from typing import Any, Final

import numpy as np

from xlathe.models.formats.gguf.architecture import (
    EMBEDDINGS,
    HEAD,
    LAYER,
    LLAMA_LIKE,
    NORMS,
    Architecture,
    head_dim_of,
    turned_of,
)
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rope import read_rope, rope_tensors, write_rope
from xlathe.models.formats.gguf.rules import Renamed

ORIGINAL: Final = "rope.scaling.original_context_length"


def read(header: Header, config: Config) -> dict[str, Any]:
    original = header.get(ORIGINAL, int, config["max_position_embeddings"])
    return {
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "original_max_position_embeddings": original,
        "sliding_window": header.get("attention.sliding_window", int) or None,
        "rope_parameters": {"partial_rotary_factor": 1.0, **read_rope(header, head_dim_of(config))},
    }


def write(config: Config) -> dict[str, Any]:
    keys = {ORIGINAL: int(config.get("original_max_position_embeddings") or config["max_position_embeddings"])}
    return {
        **keys,
        **write_rope(config, turned_of(config)),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }


def tensors(config: Config) -> dict[str, np.ndarray]:
    return rope_tensors(config, turned_of(config))


PHI3: Final = Architecture(
    name="phi3",
    model_types=("phi3",),
    prefix="model.",
    keys=(*LLAMA_LIKE, *HEAD),
    once=EMBEDDINGS,
    block=(
        *NORMS,
        Renamed("blk.{b}.attn_qkv", LAYER + "self_attn.qkv_proj"),
        Renamed("blk.{b}.attn_output", LAYER + "self_attn.o_proj"),
        Renamed("blk.{b}.ffn_up", LAYER + "mlp.gate_up_proj"),
        Renamed("blk.{b}.ffn_down", LAYER + "mlp.down_proj"),
    ),
    fixed={"hidden_act": "silu"},
    read=read,
    write=write,
    tensors=tensors,
)
