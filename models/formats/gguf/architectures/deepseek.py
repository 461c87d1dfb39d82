"""deepseek2: DeepSeek-V2 and V3, multi-head latent attention and experts in groups.

llama.cpp runs latent attention as attention with one key-value head, and wants the up-projection of the latent in two:
k_b transposed, so that it moves to the queries, and v_b. Older files have it in one piece, as Hugging Face has it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final, final

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.checkpoint import Tensor
from xlathe.models.formats.gguf.architecture import (
    EMBEDDINGS,
    FEED_FORWARD,
    LAYER,
    LENGTHS,
    NORMS,
    RMS_EPSILON,
    Architecture,
    Key,
)
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.container import Container
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rope import read_rope, rope_of, write_rope
from xlathe.models.formats.gguf.rules import Experts, Found, Older, Planned, Renamed, Rule, checked

ATTN: Final = LAYER + "self_attn."
MLP: Final = LAYER + "mlp."
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
LOG: Final = "rope.scaling.yarn_log_multiplier"


@final
@dataclasses.dataclass(frozen=True)
class LatentUp(Rule):
    """kv_b [heads * (nope + value), rank] as k_b [heads, rank, nope] and v_b [heads, value, rank]."""

    name: str = "blk.{b}.attn_k_b.weight"
    values: str = "blk.{b}.attn_v_b.weight"
    hf: str = ATTN + "kv_b_proj.weight"

    def read(self, file: Container, config: Config, b: int) -> Iterator[Found]:
        names = self.name.format(b=b), self.values.format(b=b)
        heads, nope, value, rank = _sizes(config)
        if names[0] not in file.entries:
            return
        for name, shape in zip(names, ((heads, rank, nope), (heads, value, rank)), strict=True):
            if name not in file.entries or file.entries[name].shape != shape:
                found = list(file.entries[name].shape) if name in file.entries else "none"
                raise CheckpointError(f"{file.path}: tensor {name!r}: expected {list(shape)}, found {found}")
        keys, values = (as_tensor(file, file.entries[name]) for name in names)

        def joined() -> np.ndarray:
            parts = (keys.read().swapaxes(1, 2), values.read())
            return np.concatenate(parts, axis=1).reshape(-1, rank)

        dtype = np.result_type(keys.dtype, values.dtype)
        yield self.hf.format(b=b), Tensor((heads * (nope + value), rank), dtype, joined), names

    def write(self, tensors: Mapping[str, Tensor], config: Config, b: int) -> Iterator[Planned]:
        hf = self.hf.format(b=b)
        if hf not in tensors:
            return
        heads, nope, value, rank = _sizes(config)

        def split(array: np.ndarray) -> np.ndarray:
            return array.reshape(heads, nope + value, rank)

        keys = checked(tensors[hf], lambda array: split(array)[:, :nope].swapaxes(1, 2), f"tensor {hf!r}")
        values = checked(tensors[hf], lambda array: split(array)[:, nope:], f"tensor {hf!r}")
        yield Planned(self.name.format(b=b), (heads, rank, nope), (keys,), (hf,))
        yield Planned(self.values.format(b=b), (heads, value, rank), (values,), (hf,))


def _sizes(config: Config) -> tuple[int, int, int, int]:
    return config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]


def read(header: Header, config: Config) -> dict[str, Any]:
    rotary = header.need("rope.dimension_count", int)
    header.need("attention.kv_lora_rank", int)
    both = header.get("attention.key_length_mla", int) or header.need("attention.key_length", int)
    value = header.get("attention.value_length_mla", int) or header.need("attention.value_length", int)
    if both <= rotary:
        raise CheckpointError(
            f"{header.file.path}: keys of latent attention: expected more than {rotary}, found {both}"
        )
    sigmoid = header.get("expert_gating_func", int, SOFTMAX) == SIGMOID
    rope = read_rope(header, rotary)
    if (log := header.get(LOG, float)) is not None:
        rope |= dict.fromkeys(("mscale", "mscale_all_dim"), float(np.float32(log * 10)))
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if config.get("n_group", 1) > 1 else "greedy",
        "num_key_value_heads": config["num_attention_heads"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": both - rotary,
        "qk_head_dim": both,
        "v_head_dim": value,
        "head_dim": rotary,
        "q_lora_rank": config.get("q_lora_rank"),
        "norm_topk_prob": config.get("norm_topk_prob", False),
        "routed_scaling_factor": config.get("routed_scaling_factor", 1.0),
        "attention_bias": False,
        "rope_interleave": True,
        "rope_parameters": rope,
    }


def write(config: Config) -> dict[str, Any]:
    rotary, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    sigmoid = config.get("scoring_func", "sigmoid" if config["model_type"] == "deepseek_v3" else "softmax") == "sigmoid"
    scale = rope_of(config).get("mscale_all_dim")
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotary,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotary,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_gating_func": SIGMOID if sigmoid else SOFTMAX,
        **({} if scale is None else {LOG: 0.1 * scale}),
        **write_rope(config, rotary),
    }


DEEPSEEK2: Final = Architecture(
    name="deepseek2",
    model_types=("deepseek_v3", "deepseek_v2"),
    prefix="model.",
    keys=(
        *LENGTHS,
        RMS_EPSILON,
        Key("leading_dense_block_count", "first_k_dense_replace"),
        Key("attention.q_lora_rank", "q_lora_rank"),
        Key("attention.kv_lora_rank", "kv_lora_rank"),
        Key("expert_count", "n_routed_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_shared_count", "n_shared_experts"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Key("expert_weights_scale", "routed_scaling_factor", float),
        Key("expert_weights_norm", "norm_topk_prob", bool),
        Key("expert_group_count", "n_group"),
        Key("expert_group_used_count", "topk_group"),
    ),
    once=EMBEDDINGS,
    block=(
        *NORMS,
        Renamed("blk.{b}.attn_q", ATTN + "q_proj"),
        Renamed("blk.{b}.attn_q_a", ATTN + "q_a_proj"),
        Renamed("blk.{b}.attn_q_a_norm", ATTN + "q_a_layernorm"),
        Renamed("blk.{b}.attn_q_b", ATTN + "q_b_proj"),
        Renamed("blk.{b}.attn_kv_a_mqa", ATTN + "kv_a_proj_with_mqa"),
        Renamed("blk.{b}.attn_kv_a_norm", ATTN + "kv_a_layernorm"),
        LatentUp(),
        Renamed("blk.{b}.attn_output", ATTN + "o_proj"),
        *FEED_FORWARD,
        Renamed("blk.{b}.ffn_gate_inp", MLP + "gate"),
        Renamed("blk.{b}.exp_probs_b.bias", MLP + "gate.e_score_correction_bias", exact=True),
        *(
            Experts(f"blk.{{b}}.ffn_{w}_exps.weight", f"{MLP}experts.{{e}}.{w}_proj.weight", ("n_routed_experts",))
            for w in ("gate", "down", "up")
        ),
        *(Renamed(f"blk.{{b}}.ffn_{w}_shexp", f"{MLP}shared_experts.{w}_proj") for w in ("gate", "down", "up")),
        Older(Renamed("blk.{b}.attn_kv_b", ATTN + "kv_b_proj")),
    ),
    fixed={"hidden_act": "silu"},
    read=read,
    write=write,
)
