"""llama: Llama 2 and 3, Mistral, and Mixtral as one with experts."""

from typing import Any, Final

import numpy as np

from xlathe.models.formats.gguf.architecture import (
    EMBEDDINGS,
    FEED_FORWARD,
    HEAD,
    LAYER,
    LLAMA_LIKE,
    NORMS,
    WINDOW,
    Architecture,
    Key,
    head_dim_of,
    turned_of,
)
from xlathe.models.formats.gguf.changes import Config, RotaryPairs
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rope import read_rope, rope_tensors, write_rope
from xlathe.models.formats.gguf.rules import Experts, Renamed

MOE: Final = LAYER + "block_sparse_moe."


def read(header: Header, config: Config) -> dict[str, Any]:
    head_dim = config.get("head_dim") or header.get("rope.dimension_count", int) or head_dim_of(config)
    kind = "mixtral" if config.get("num_local_experts") else "mistral" if config.get("sliding_window") else "llama"
    return {
        "model_type": kind,
        "head_dim": head_dim,
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "attention_bias": "blk.0.attn_q.bias" in header.file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in header.file.entries,
        "rope_parameters": read_rope(header, head_dim),
    }


def write(config: Config) -> dict[str, Any]:
    return write_rope(config, turned_of(config))


def tensors(config: Config) -> dict[str, np.ndarray]:
    return rope_tensors(config, turned_of(config))


LLAMA: Final = Architecture(
    name="llama",
    model_types=("llama", "mistral", "mixtral"),
    prefix="model.",
    # llama.cpp does not read the window of this architecture; it is written so that it is not lost
    keys=(*LLAMA_LIKE, *HEAD, WINDOW, Key("expert_count", "num_local_experts"),
          Key("expert_used_count", "num_experts_per_tok")),
    once=EMBEDDINGS,
    block=(
        *NORMS,
        Renamed("blk.{b}.attn_q", LAYER + "self_attn.q_proj", RotaryPairs("num_attention_heads")),
        Renamed("blk.{b}.attn_k", LAYER + "self_attn.k_proj", RotaryPairs("num_key_value_heads")),
        Renamed("blk.{b}.attn_v", LAYER + "self_attn.v_proj"),
        Renamed("blk.{b}.attn_output", LAYER + "self_attn.o_proj"),
        *FEED_FORWARD,
        Renamed("blk.{b}.ffn_gate_inp", MOE + "gate"),
        Experts("blk.{b}.ffn_gate_exps.weight", MOE + "experts.{e}.w1.weight", ("num_local_experts",)),
        Experts("blk.{b}.ffn_down_exps.weight", MOE + "experts.{e}.w2.weight", ("num_local_experts",)),
        Experts("blk.{b}.ffn_up_exps.weight", MOE + "experts.{e}.w3.weight", ("num_local_experts",)),
    ),
    fixed={"hidden_act": "silu"},
    read=read,
    write=write,
    tensors=tensors,
)  # fmt: skip
