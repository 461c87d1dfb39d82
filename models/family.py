"""What a family of pretrained models is, and how its weights are called in Hugging Face's files."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from xlathe.errors import CheckpointError, did_you_mean
from xlathe.models.resize import Change, Shapes, change_nothing, resize_separate
from xlathe.models.settings import Settings


@dataclasses.dataclass(frozen=True)
class Family:
    """A plain forward, built from `config.json`, and the names of its weights in the files.

    architecture: as `architectures` of config.json has it.
    build: (settings, longest text to serve, rngs) -> a module that takes int32 tokens [b, t].
    names: ours by theirs, `layers/*/attention/query/kernel` -> `model.layers.*.self_attn.q_proj.weight`; the stars are
        equal. A name that a configuration has no weight for (a bias, an untied head) may be in the table all the same.
    linear: whether files hold a `kernel` as `torch.nn.Linear` does, [outputs, inputs]; GPT-2's are [inputs, outputs],
        but for its head.
    resize: (shapes of our weights, settings) -> entries of config.json that say the sizes of a pruned model.
    adapt: (shapes of our weights, settings before) -> how weights of a pruned model change in files, where a constant
        of the forward follows from a size that is another now.
    indexed: settings by which what a layer computes, and not its weights, follows from its index.
    arguments: what a forward takes beside tokens, by keyword.
    ignored: regular expressions of what may be in a file and is no weight: buffers, layers for training alone.
    """

    architecture: str
    build: Callable[[Settings, int, nnx.Rngs], nnx.Module]
    names: Mapping[str, str]
    linear: bool = True
    resize: Callable[[Shapes, Settings], dict[str, Any]] = resize_separate
    adapt: Callable[[Shapes, Settings], dict[str, Change]] = change_nothing
    indexed: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)


ATTENTION = {
    f"layers/*/attention/{ours}/{leaf}": f"model.layers.*.self_attn.{theirs}.{kind}"
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj"))
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
} | {
    "layers/*/attention/query_norm/scale": "model.layers.*.self_attn.q_norm.weight",
    "layers/*/attention/key_norm/scale": "model.layers.*.self_attn.k_norm.weight",
}
FEED_FORWARD = {
    f"layers/*/feed_forward/{part}/{leaf}": f"model.layers.*.mlp.{part}_proj.{kind}"
    for part in ("gate", "up", "down")
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
}
DECODER = {
    "embedding/embedding": "model.embed_tokens.weight",
    "layers/*/attention_norm/scale": "model.layers.*.input_layernorm.weight",
    "layers/*/feed_forward_norm/scale": "model.layers.*.post_attention_layernorm.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
"""The names that most decoders follow since Llama; each family adds to them or replaces some."""

MODEL_TYPES: Mapping[str, str] = {  # of config.json, and the modules whose FAMILY builds them
    "bert": "bert",
    "deepseek_v3": "deepseek_v3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """Returns the family of a configuration; raises CheckpointError for an unknown one."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise CheckpointError(f"{where}: no family for model_type {kind!r}{did_you_mean(str(kind), MODEL_TYPES)}")
    family: Family = importlib.import_module(f"xlathe.models.{MODEL_TYPES[kind]}").FAMILY
    return family
