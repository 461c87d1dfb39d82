"""qwen2, qwen3 and qwen3moe: rows of rotary projections stay as Hugging Face has them."""

from typing import Any, Final

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.architecture import (
    ATTENTION,
    EMBEDDINGS,
    FEED_FORWARD,
    HEAD,
    HEAD_NORMS,
    LAYER,
    LLAMA_LIKE,
    NORMS,
    Architecture,
    Key,
    head_dim_of,
    turned_of,
)
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rope import read_rope, write_rope
from xlathe.models.formats.gguf.rules import Experts, Renamed

EXPERTS: Final = ("num_local_experts", "num_experts")


def read(header: Header, config: Config) -> dict[str, Any]:
    head_dim = head_dim_of(config)
    return {
        "head_dim": head_dim,
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "use_sliding_window": False,
        "rope_parameters": read_rope(header, head_dim),
    }


def write(config: Config) -> dict[str, Any]:
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        raise CheckpointError("config: use_sliding_window: GGUF's qwen architectures have no window, found true")
    return write_rope(config, turned_of(config))


def read_moe(header: Header, config: Config) -> dict[str, Any]:
    return {**read(header, config), "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def write_moe(config: Config) -> dict[str, Any]:
    for name, expected in {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}.items():
        if config.get(name, expected) != expected:
            raise CheckpointError(f"config: {name}: GGUF's qwen3moe expects {expected!r}, found {config[name]!r}")
    return write(config)


QWEN2: Final = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    prefix="model.",
    keys=(*LLAMA_LIKE, *HEAD),
    once=EMBEDDINGS,
    block=(*NORMS, *ATTENTION, *FEED_FORWARD),
    fixed={"hidden_act": "silu"},
    read=read,
    write=write,
)
QWEN3: Final = Architecture(
    name="qwen3",
    model_types=("qwen3",),
    prefix="model.",
    keys=(*LLAMA_LIKE, *HEAD),
    once=EMBEDDINGS,
    block=(*NORMS, *ATTENTION, *HEAD_NORMS, *FEED_FORWARD),
    fixed={"hidden_act": "silu"},
    read=read,
    write=write,
)
QWEN3MOE: Final = Architecture(
    name="qwen3moe",
    model_types=("qwen3_moe",),
    prefix="model.",
    keys=(
        *LLAMA_LIKE,
        *HEAD,
        *(Key("expert_count", name) for name in EXPERTS),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    once=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        *HEAD_NORMS,
        Renamed("blk.{b}.ffn_gate_inp", LAYER + "mlp.gate"),
        *(
            Experts(f"blk.{{b}}.ffn_{w}_exps.weight", f"{LAYER}mlp.experts.{{e}}.{w}_proj.weight", EXPERTS)
            for w in ("gate", "down", "up")
        ),
    ),
    fixed={"hidden_act": "silu"},
    read=read_moe,
    write=write_moe,
)
