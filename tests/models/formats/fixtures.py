"""Tiny checkpoints of every family that `transformers` saved and ran; see their README."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint, Tensor

FIXTURES = Path("/work/shared/fixtures/hf")
FAMILIES = (
    "bert", "deepseek-v3", "gemma2", "gemma3", "gpt-neox", "gpt2", "llama", "mistral-window", "mixtral", "phi3",
    "qwen2", "qwen3", "qwen3-moe",
)  # fmt: skip


def of_arrays(config: dict, arrays: dict[str, np.ndarray]) -> Checkpoint:
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    return Checkpoint(Card(config), tensors, "arrays")


def load(family: str) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    """Returns a family's checkpoint, and what was computed from it: input_ids, logits, greedy."""
    folder = FIXTURES / family
    if not folder.exists():
        pytest.skip(f"needs the fixture {folder}")
    config = json.loads((folder / "config.json").read_text())
    return of_arrays(config, load_file(folder / "model.safetensors")), load_file(folder / "expected.safetensors")
