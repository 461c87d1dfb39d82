"""What GGUF knows of a family of models: keys, tensors, and how the two relate to Hugging Face's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rules import Renamed, Rule


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the metadata, without the architecture's prefix, that says what one key of `config.json` says."""

    name: str
    hf: str
    kind: type[int] | type[float] | type[bool] = int


def nothing(config: Config) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The table of one architecture.

    name: `general.architecture`; model_types: of `config.json`; prefix: of Hugging Face's names of all but the head;
    once, block: rules for the tensors of the model and of each layer; fixed: settings that the architecture implies,
    which others may not contradict; read: the rest of the config, of the header and what `keys` gave; write: the rest
    of the metadata, of a config; tensors: what the file has and Hugging Face's does not; dropped: beginnings and ends
    of names that the file has no place for.
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    keys: tuple[Key, ...]
    once: tuple[Rule, ...]
    block: tuple[Rule, ...]
    fixed: Mapping[str, Any]
    read: Callable[[Header, Config], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]
    tensors: Callable[[Config], dict[str, np.ndarray]] = nothing
    dropped: tuple[str, ...] = ()


REQUIRED: Final = {"block_count", "context_length", "embedding_length", "attention.head_count"}
LENGTHS: Final = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
)
RMS_EPSILON: Final = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float)
LLAMA_LIKE: Final = (*LENGTHS, Key("attention.head_count_kv", "num_key_value_heads"), RMS_EPSILON)
HEAD: Final = (Key("attention.key_length", "head_dim"), Key("attention.value_length", "head_dim"))
WINDOW: Final = Key("attention.sliding_window", "sliding_window")

EMBEDDINGS: Final = (
    Renamed("token_embd", "model.embed_tokens"),
    Renamed("output_norm", "model.norm"),
    Renamed("output", "lm_head"),
)
LAYER: Final = "model.layers.{b}."
NORMS: Final = (
    Renamed("blk.{b}.attn_norm", LAYER + "input_layernorm"),
    Renamed("blk.{b}.ffn_norm", LAYER + "post_attention_layernorm"),
)
ATTENTION: Final = (
    Renamed("blk.{b}.attn_q", LAYER + "self_attn.q_proj"),
    Renamed("blk.{b}.attn_k", LAYER + "self_attn.k_proj"),
    Renamed("blk.{b}.attn_v", LAYER + "self_attn.v_proj"),
    Renamed("blk.{b}.attn_output", LAYER + "self_attn.o_proj"),
)
HEAD_NORMS: Final = (
    Renamed("blk.{b}.attn_q_norm", LAYER + "self_attn.q_norm"),
    Renamed("blk.{b}.attn_k_norm", LAYER + "self_attn.k_norm"),
)
FEED_FORWARD: Final = (
    Renamed("blk.{b}.ffn_gate", LAYER + "mlp.gate_proj"),
    Renamed("blk.{b}.ffn_up", LAYER + "mlp.up_proj"),
    Renamed("blk.{b}.ffn_down", LAYER + "mlp.down_proj"),
)


def head_dim_of(config: Config) -> int:
    """The features of a head: `head_dim`, or the width shared among the heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def turned_of(config: Config) -> int:
    """The features of a head that are rotated: all, or the first `partial_rotary_factor` of them."""
    said = ((config.get("rope_parameters") or {}).get("partial_rotary_factor"), config.get("partial_rotary_factor"))
    share = next((value for value in (*said, config.get("rotary_pct")) if value is not None), 1.0)
    return int(share * head_dim_of(config))


def required(architecture: Architecture) -> list[Key]:
    return [key for key in architecture.keys if key.name in REQUIRED]


def read_config(architecture: Architecture, header: Header) -> dict[str, Any]:
    """Returns the config of a file. Raises CheckpointError for keys that are missing, or contradict each other."""
    config: dict[str, Any] = {"model_type": architecture.model_types[0], **architecture.fixed}
    for key in architecture.keys:
        if (value := header.get(key.name, key.kind)) is None:
            continue
        if config.setdefault(key.hf, value) != value:
            raise CheckpointError(
                f"{header.file.path}: key {header.architecture + '.' + key.name!r}: expected {config[key.hf]} as other"
                f" keys of {key.hf} say, found {value}"
            )
    for key in required(architecture):
        if header.need(key.name, int) < 1:
            raise CheckpointError(f"{header.file.path}: key {key.name!r}: expected 1 or more, found {config[key.hf]}")
    config["vocab_size"] = header.shape("token_embd.weight", 2)[0]
    config["tie_word_embeddings"] = "output.weight" not in header.file.entries
    return {**config, **architecture.read(header, config)}


def write_keys(architecture: Architecture, config: Config) -> dict[str, Any]:
    """Returns the metadata of a config. Raises CheckpointError for what GGUF cannot say of it."""
    for name, expected in architecture.fixed.items():
        if config.get(name, expected) not in (expected, None):
            raise CheckpointError(
                f"config: {name}: GGUF's {architecture.name} expects {expected!r}, found {config[name]!r}"
            )
    keys = {key.name: key.kind(config[key.hf]) for key in architecture.keys if config.get(key.hf) is not None}
    for key in required(architecture):
        if key.name not in keys:
            raise CheckpointError(f"config: expected {key.hf!r}, found none")
    return {f"{architecture.name}.{name}": value for name, value in {**keys, **architecture.write(config)}.items()}
