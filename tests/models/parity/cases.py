"""What `config.json` can say of each family: the configurations that are compared with transformers.

Shared by `make_expected.py`, which runs in an environment with transformers, and by the tests, which run without it. A
configuration is written as files on the hub have it, old keys and new ones; what a case leaves out has the family's
default.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

WINDOW = 6  # tokens; shorter than a prompt, so that windows change the logits

SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a family.

    changes: to the family's configuration; None stands for null. absent: its keys that are left out.
    max_len: what `from_pretrained` is asked for. embedding: the standard deviation of the embeddings, 1 where nothing
    is said; small ones show what is added to a variance.
    """

    name: str
    changes: Mapping[str, Any]
    absent: tuple[str, ...] = ()
    max_len: int | None = None
    embedding: float = 1.0


@dataclasses.dataclass(frozen=True)
class Family:
    """Configurations of one `model_type`, and what they have in common."""

    model_type: str
    common: Mapping[str, Any]
    cases: tuple[Case, ...]

    def config(self, case: Case) -> dict[str, Any]:
        """Returns the `config.json` of a case."""
        values = {"model_type": self.model_type, **self.common, **case.changes}
        return {name: value for name, value in values.items() if name not in case.absent}


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    """Scaling as files had it before version 5 of transformers."""
    return {"rope_theta": 10000.0, "rope_scaling": {"type": kind, **values}}


LLAMA = Family(
    "llama",
    {**SIZES, "rms_norm_eps": 1e-6},
    (
        Case("llama_1", {"hidden_act": "silu", "torch_dtype": "float32"}),
        Case("grouped", {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": None}),
        Case("one_key_value_head", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
        Case("biases", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
        Case("defaults", {}, absent=("rms_norm_eps",), embedding=1e-2),
        Case("rope_linear", scaled("linear", factor=4.0)),
        Case("rope_dynamic", scaled("dynamic", factor=2.0)),
        Case(
            "rope_llama3",
            {
                "num_key_value_heads": 2,
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_type": "llama3",
                },
            },
        ),
        Case(
            "rope_yarn",
            {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 4.0,
                    "beta_slow": 0.5,
                },
            },
        ),
        Case(
            "rope_yarn_by_defaults",
            {"head_dim": 16, **scaled("yarn", factor=2.0, attention_factor=1.3, truncate=False)},
        ),
    ),
)

MISTRAL = Family(
    "mistral",
    {**SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": WINDOW},
    (
        Case("window", {}),
        Case("no_window", {"sliding_window": None, "head_dim": 16, "rope_theta": 1000000.0}),
        Case("tied", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
        Case("defaults", {}, absent=("rms_norm_eps", "rope_theta", "sliding_window"), embedding=1e-2),
    ),
)

QWEN2 = Family(
    "qwen2",
    {
        **SIZES,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    (
        Case("upper_windows", {}),
        Case("unused_window", {"use_sliding_window": False, "tie_word_embeddings": True}),
        Case("layer_types", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        Case(
            "rope_yarn",
            {
                "use_sliding_window": False,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
            },
        ),
        Case(
            "defaults",
            {},
            absent=("rms_norm_eps", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers"),
            embedding=1e-2,
        ),
    ),
)

QWEN3 = Family(
    "qwen3",
    {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    (
        Case("untied", {"tie_word_embeddings": False}),
        Case("tied", {"tie_word_embeddings": True}),
        Case("biases", {"attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        Case("windows", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
        Case(
            "defaults",
            {},
            absent=("rms_norm_eps", "rope_theta", "attention_bias", "use_sliding_window"),
            embedding=1e-2,
        ),
    ),
)

GEMMA2 = Family(
    "gemma2",
    {
        **SIZES,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    (
        Case("soft_caps", {}, embedding=0.3),
        Case("no_soft_caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, embedding=0.3),
        Case(
            "odd_windows",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            embedding=0.3,
        ),
        Case("untied_biases", {"attention_bias": True, "tie_word_embeddings": False, "hidden_activation": "silu"}),
        Case(
            "defaults",
            {},
            absent=(
                "rms_norm_eps",
                "rope_theta",
                "sliding_window",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "hidden_act",
                "hidden_activation",
            ),
            embedding=1e-3,
        ),
    ),
)

GEMMA3 = Family(
    "gemma3_text",
    {
        **SIZES,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    (
        Case(
            "old_keys",
            {
                "rope_theta": 1000000.0,
                "rope_local_base_freq": 5000.0,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window_pattern": 3,
            },
            embedding=0.3,
        ),
        Case(
            "new_keys",
            {
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                },
            },
            embedding=0.3,
        ),
        Case(
            "soft_cap",
            {"final_logit_softcapping": 8.0, "sliding_window_pattern": 2},
            embedding=0.3,
        ),
        Case("untied_biases", {"attention_bias": True, "tie_word_embeddings": False}),
        Case(
            "defaults",
            {"num_hidden_layers": 6},
            absent=("rms_norm_eps", "sliding_window", "query_pre_attn_scalar", "hidden_activation"),
            embedding=1e-3,
        ),
    ),
)

LONGROPE = {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.5, 3.0, 6.0, 12.0]}

PHI3 = Family(
    "phi3",
    {
        **SIZES,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "sliding_window": None,
    },
    (
        Case("plain", {}),
        Case("partly_rotated", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
        Case(
            "longrope_short",
            {"original_max_position_embeddings": 40, "rope_scaling": {"type": "longrope", **LONGROPE}},
            max_len=40,
        ),
        Case(
            "longrope_long",
            {"original_max_position_embeddings": 8, "rope_scaling": {"type": "longrope", **LONGROPE}},
        ),
        Case(
            "longrope_partly_rotated",
            {
                "num_attention_heads": 2,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 8,
                "rope_parameters": {"rope_type": "longrope", "attention_factor": 1.1, **LONGROPE},
            },
            absent=("rope_theta",),
        ),
        Case(
            "rope_su",
            {"rope_scaling": {"type": "su", "original_max_position_embeddings": 8, **LONGROPE}},
            absent=("original_max_position_embeddings",),
        ),
        Case("window", {"sliding_window": WINDOW, "num_attention_heads": 2, "hidden_act": "gelu"}),
        Case("defaults", {}, absent=("rms_norm_eps", "rope_theta", "sliding_window"), embedding=1e-2),
    ),
)

GPT2 = Family(
    "gpt2",
    {**GPT2_SIZES, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    (
        Case("plain", {}),
        Case("inner", {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False}),
        Case("scaled_by_layer", {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}),
        Case("unscaled", {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "activation_function": "silu"}),
        Case("gelu_fast", {"activation_function": "gelu_fast"}),
        Case("defaults", {}, absent=("layer_norm_epsilon", "activation_function"), embedding=1e-2),
    ),
)

GPT_NEOX = Family(
    "gpt_neox",
    {**SIZES, "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu"},
    (
        Case("parallel", {"use_parallel_residual": True}),
        Case("serial", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast"}),
        Case("no_biases", {"attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 500, "hidden_act": "relu"}),
        Case(
            "new_keys",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 500.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            absent=("rotary_pct", "rotary_emb_base"),
        ),
        Case(
            "defaults",
            {"tie_word_embeddings": True},
            absent=("layer_norm_eps", "rotary_pct", "rotary_emb_base", "hidden_act"),
            embedding=1e-2,
        ),
    ),
)

MIXTRAL = Family(
    "mixtral",
    {
        **SIZES,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    (
        Case("top_2_of_4", {}),
        Case("top_3_of_8", {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}),
        Case("top_1", {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
        Case("window", {"sliding_window": WINDOW, "hidden_act": "gelu"}),
        Case(
            "defaults",
            {},
            absent=("num_experts_per_tok", "rms_norm_eps", "rope_theta", "sliding_window"),
            embedding=1e-2,
        ),
    ),
)

QWEN3_MOE = Family(
    "qwen3_moe",
    {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    (
        Case("normalized", {}),
        Case("not_normalized", {"norm_topk_prob": False, "num_experts": 8, "num_experts_per_tok": 3}),
        Case("sparse_step", {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
        Case("dense_layers", {"num_hidden_layers": 3, "mlp_only_layers": [1], "attention_bias": True}),
        Case("window", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
        Case(
            "defaults",
            {},
            absent=("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "rms_norm_eps", "rope_theta"),
            embedding=1e-2,
        ),
    ),
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    {
        **SIZES,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    (
        Case("groups", {}),
        Case("no_query_latent", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}),
        Case("dense_layers", {"first_k_dense_replace": 2, "n_shared_experts": 2, "norm_topk_prob": False}),
        Case(
            "rope_yarn",
            {
                "rope_scaling": {
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "factor": 4,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.8,
                    "original_max_position_embeddings": 16,
                    "type": "yarn",
                },
            },
        ),
        Case("not_interleaved", {"rope_interleave": False, "attention_bias": True, "routed_scaling_factor": 1.0}),
    ),
)

BERT = Family(
    "bert",
    {**SIZES, "type_vocab_size": 2},
    (
        Case("plain", {}),
        Case("activation", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        Case("defaults", {}, absent=("type_vocab_size",)),
    ),
)

ENCODERS: tuple[Family, ...] = (BERT,)
DECODERS: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    QWEN3_MOE,
    DEEPSEEK_V3,
)
FAMILIES: tuple[Family, ...] = (*DECODERS, *ENCODERS)


def every_case() -> Iterator[tuple[Family, Case]]:
    for family in FAMILIES:
        for case in family.cases:
            yield family, case
