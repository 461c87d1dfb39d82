"""gpt2 and gptneox."""

from typing import Any, Final

from xlathe.models.formats.gguf.architecture import (
    LENGTHS,
    Architecture,
    Key,
    head_dim_of,
    turned_of,
)
from xlathe.models.formats.gguf.changes import Config, HeadsTogether, Transposed
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rope import read_rope, write_rope
from xlathe.models.formats.gguf.rules import Renamed

H: Final = "transformer.h.{b}."
N: Final = "gpt_neox.layers.{b}."


def read_gpt2(header: Header, config: Config) -> dict[str, Any]:
    inner = config.get("n_inner")
    return {"n_inner": None if inner == 4 * config["n_embd"] else inner}


def write_gpt2(config: Config) -> dict[str, Any]:
    return {"feed_forward_length": config.get("n_inner") or 4 * config["n_embd"]}


def read_gptneox(header: Header, config: Config) -> dict[str, Any]:
    return {
        "rope_parameters": {"partial_rotary_factor": 1.0, **read_rope(header, head_dim_of(config))},
        "attention_bias": "blk.0.attn_qkv.bias" in header.file.entries,
        "use_parallel_residual": header.get("use_parallel_residual", bool, True),
    }


def write_gptneox(config: Config) -> dict[str, Any]:
    parallel = bool(config.get("use_parallel_residual", True))
    return {"use_parallel_residual": parallel, **write_rope(config, turned_of(config))}


GPT2: Final = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    prefix="transformer.",
    keys=(
        Key("block_count", "n_layer"),
        Key("context_length", "n_positions"),
        Key("embedding_length", "n_embd"),
        Key("attention.head_count", "n_head"),
        Key("attention.layer_norm_epsilon", "layer_norm_epsilon", float),
        Key("feed_forward_length", "n_inner"),
    ),
    once=(
        Renamed("token_embd", "transformer.wte"),
        Renamed("position_embd", "transformer.wpe"),
        Renamed("output_norm", "transformer.ln_f"),
        Renamed("output", "lm_head"),
    ),
    block=(
        Renamed("blk.{b}.attn_norm", H + "ln_1"),
        Renamed("blk.{b}.attn_qkv", H + "attn.c_attn", Transposed()),
        Renamed("blk.{b}.attn_output", H + "attn.c_proj", Transposed()),
        Renamed("blk.{b}.ffn_norm", H + "ln_2"),
        Renamed("blk.{b}.ffn_up", H + "mlp.c_fc", Transposed()),
        Renamed("blk.{b}.ffn_down", H + "mlp.c_proj", Transposed()),
    ),
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    read=read_gpt2,
    write=write_gpt2,
    dropped=(".attn.bias", ".attn.masked_bias"),
)
GPTNEOX: Final = Architecture(
    name="gptneox",
    model_types=("gpt_neox",),
    prefix="gpt_neox.",
    keys=(*LENGTHS, Key("attention.layer_norm_epsilon", "layer_norm_eps", float)),
    once=(
        Renamed("token_embd", "gpt_neox.embed_in"),
        Renamed("output_norm", "gpt_neox.final_layer_norm"),
        Renamed("output", "embed_out"),
    ),
    block=(
        Renamed("blk.{b}.attn_norm", N + "input_layernorm"),
        Renamed("blk.{b}.attn_qkv", N + "attention.query_key_value", HeadsTogether()),
        Renamed("blk.{b}.attn_output", N + "attention.dense"),
        Renamed("blk.{b}.ffn_norm", N + "post_attention_layernorm"),
        Renamed("blk.{b}.ffn_up", N + "mlp.dense_h_to_4h"),
        Renamed("blk.{b}.ffn_down", N + "mlp.dense_4h_to_h"),
    ),
    fixed={"hidden_act": "gelu"},
    read=read_gptneox,
    write=write_gptneox,
    dropped=(".attention.bias", ".attention.masked_bias"),
)
