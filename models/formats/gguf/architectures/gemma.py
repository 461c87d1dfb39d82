"""gemma2 and gemma3: norms that multiply by 1 + w, sliding windows in some layers, soft caps."""

from typing import Any, Final

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.architecture import (
    ATTENTION,
    FEED_FORWARD,
    HEAD,
    LAYER,
    LLAMA_LIKE,
    WINDOW,
    Architecture,
    Key,
    head_dim_of,
)
from xlathe.models.formats.gguf.changes import Config, PlusOne
from xlathe.models.formats.gguf.header import Header
from xlathe.models.formats.gguf.rope import THETA, read_rope, rope_of, write_rope
from xlathe.models.formats.gguf.rules import Renamed

LARGEST: Final = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores are scaled otherwise
SLIDING, FULL = "sliding_attention", "full_attention"


def scalar(architecture: str, config: Config) -> int:
    """What the square root of divides the scores: GGUF has no key for it, llama.cpp goes by the number of layers."""
    if config["num_hidden_layers"] == LARGEST[architecture]:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def layer_types(layers: int, period: int) -> list[str]:
    return [FULL if (b + 1) % period == 0 else SLIDING for b in range(layers)]


def check(architecture: str, config: Config, period: int) -> None:
    """Raises CheckpointError for settings that GGUF does not say and llama.cpp takes otherwise."""
    expected = {
        "query_pre_attn_scalar": scalar(architecture, config),
        "layer_types": layer_types(config["num_hidden_layers"], period),
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"config: {name}: GGUF's {architecture} expects {value}, found {config[name]}")


def _common(architecture: str, config: Config, period: int) -> dict[str, Any]:
    found = {"head_dim": head_dim_of(config), "num_key_value_heads": config["num_attention_heads"], **config}
    return {
        "head_dim": found["head_dim"],
        "num_key_value_heads": found["num_key_value_heads"],
        "attention_bias": False,
        "query_pre_attn_scalar": scalar(architecture, found),
        "layer_types": layer_types(config["num_hidden_layers"], period),
    }


def read_gemma2(header: Header, config: Config) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None, **config}
    return {
        **_common("gemma2", config, period=2),
        "sliding_window": config.get("sliding_window", 4096),
        "attn_logit_softcapping": caps["attn_logit_softcapping"],
        "final_logit_softcapping": caps["final_logit_softcapping"],
        "rope_parameters": read_rope(header, head_dim_of(config)),
    }


def write_gemma2(config: Config) -> dict[str, Any]:
    check("gemma2", config, period=2)
    if (rope := rope_of(config)) != {"rope_type": "default", "rope_theta": THETA}:
        raise CheckpointError(f"config: rope_parameters: GGUF's gemma2 expects the default of {THETA}, found {rope}")
    return {}


def read_gemma3(header: Header, config: Config) -> dict[str, Any]:
    full = read_rope(header, head_dim_of(config))
    sliding = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", float, THETA)}
    found = _common("gemma3", config, period=6)
    if not config.get("sliding_window"):
        found["layer_types"] = [FULL] * config["num_hidden_layers"]
    return {
        **found,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "rope_parameters": {FULL: full, SLIDING: sliding},
    }


def write_gemma3(config: Config) -> dict[str, Any]:
    check("gemma3", config, period=6)
    if config.get("attn_logit_softcapping") is not None:
        raise CheckpointError("config: attn_logit_softcapping: GGUF's gemma3 has none, found one")
    keys = write_rope(config, head_dim_of(config))
    keys.pop("rope.dimension_count")
    sliding = (config.get("rope_parameters") or {}).get(SLIDING, {})
    theta = sliding.get("rope_theta", config.get("rope_local_base_freq", THETA))
    return {**keys, "rope.freq_base_swa": float(theta)}


ONCE: Final = (
    Renamed("token_embd", "model.embed_tokens"),
    Renamed("output_norm", "model.norm", PlusOne()),
)
NORMS: Final = (
    Renamed("blk.{b}.attn_norm", LAYER + "input_layernorm", PlusOne()),
    Renamed("blk.{b}.post_attention_norm", LAYER + "post_attention_layernorm", PlusOne()),
    Renamed("blk.{b}.ffn_norm", LAYER + "pre_feedforward_layernorm", PlusOne()),
    Renamed("blk.{b}.post_ffw_norm", LAYER + "post_feedforward_layernorm", PlusOne()),
)
HEAD_NORMS: Final = (
    Renamed("blk.{b}.attn_q_norm", LAYER + "self_attn.q_norm", PlusOne()),
    Renamed("blk.{b}.attn_k_norm", LAYER + "self_attn.k_norm", PlusOne()),
)
FINAL_CAP: Final = Key("final_logit_softcapping", "final_logit_softcapping", float)

GEMMA2: Final = Architecture(
    name="gemma2",
    model_types=("gemma2",),
    prefix="model.",
    keys=(*LLAMA_LIKE, *HEAD, WINDOW, Key("attn_logit_softcapping", "attn_logit_softcapping", float), FINAL_CAP),
    once=ONCE,
    block=(*NORMS, *ATTENTION, *FEED_FORWARD),
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    read=read_gemma2,
    write=write_gemma2,
    dropped=("lm_head.weight",),
)
GEMMA3: Final = Architecture(
    name="gemma3",
    model_types=("gemma3_text",),
    prefix="model.",
    keys=(*LLAMA_LIKE, *HEAD, WINDOW, FINAL_CAP),
    once=ONCE,
    block=(*NORMS, *ATTENTION, *HEAD_NORMS, *FEED_FORWARD),
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    read=read_gemma3,
    write=write_gemma3,
    dropped=("lm_head.weight",),
)
