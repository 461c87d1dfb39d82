"""Tiny checkpoints with random weights, for tests that are not about the numbers of a family."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.family import find_family
from xlathe.models.formats.huggingface import write_huggingface
from xlathe.models.naming import is_turned, their_name
from xlathe.models.pretrained import weight_shapes
from xlathe.models.settings import Settings

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 8,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def tiny_checkpoint(config: Mapping[str, Any] = LLAMA, dtype: Any = np.float32) -> Checkpoint:
    """Random weights, the same for the same name and shape."""
    family = find_family(config, "test")
    module = nnx.eval_shape(lambda: family.build(Settings(config), 32, nnx.Rngs(0)))
    tensors = {}
    for ours, shape in weight_shapes(module).items():
        tensors[their_name(family, ours)] = random_tensor(
            ours, shape[::-1] if is_turned(family, ours) else shape, dtype
        )
    return Checkpoint(Card(config), tensors, "test")


def random_tensor(name: str, shape: tuple[int, ...], dtype: Any) -> Tensor:
    def read() -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        return (drawn / np.sqrt(shape[-1]) if len(shape) > 1 else 1 + drawn / 8).astype(dtype)

    return Tensor(shape, np.dtype(dtype), read)


def write_tiny(folder: Path, config: Mapping[str, Any] = LLAMA, dtype: Any = np.float32) -> Path:
    write_huggingface(tiny_checkpoint(config, dtype), folder)
    return folder
