"""Adapters of low rank, as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.

LoRA (Hu et al. 2021, arXiv 2106.09685): W + scale B A, with A [r, inputs], B [outputs, r] and scale = alpha / r, or
alpha / sqrt(r) (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732). The format: https://huggingface.co/docs/peft.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from xlathe.errors import CheckpointError, brief
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.json_file import read_json
from xlathe.safetensors_file import Tensor, read_safetensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
SUPPORTED: Final[Mapping[str, Any]] = {"bias": "none"}
"""What a setting has to say, where it is there at all; else that it is off."""
OFF: Final = (
    *("use_dora", "modules_to_save", "lora_bias", "layer_replication", "use_qalora", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "velora_config", "arrow_config"),
)
"""Settings of adapters that are no sum of a weight and a product."""
BEGUN: Final = (True, False, None, "gaussian", "orthogonal", "eva")
"""What factors may begin as: others (PiSSA, OLoRA, LoftQ, ...) are trained beside a base that was changed for them."""
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def fold_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """Returns the checkpoint with an adapter added to its matrices when they are read, in float32; dtypes stay.

    Raises CheckpointError, naming file and setting or tensor, for kinds of adapters that are not supported, a factor
    without its other one, a matrix that the base does not have, and shapes that do not fit.
    """
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    tensors = dict(base.tensors)
    for module, factors in _factors(folder).items():
        name = f"{module}.weight"
        if name not in tensors:
            raise CheckpointError(f"{folder / WEIGHTS} changes {name!r}, which {base.where} does not have")
        missing = sorted({"A", "B"} - factors.keys())
        if missing:
            raise CheckpointError(f"{folder / WEIGHTS}: {module} has no lora_{missing[0]}")
        scale = _scale(config, module, factors["A"].shape[0], folder / CONFIG)
        turned = bool(config.get("fan_in_fan_out"))
        tensors[name] = _folded(
            tensors[name], factors["A"], factors["B"], scale, turned, f"{folder / WEIGHTS}: {module}"
        )
    return dataclasses.replace(base, tensors=tensors, where=f"{base.where}+{folder}")


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type: expected LORA, found {config.get('peft_type')!r}")
    for key, expected in SUPPORTED.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"{where}: {key}: expected {expected!r}, found {brief(config[key])}: not supported")
    for key in OFF:
        if config.get(key):
            raise CheckpointError(f"{where}: {key} is {brief(config[key])}: such adapters are not supported")
    if (begun := config.get("init_lora_weights")) not in BEGUN:
        raise CheckpointError(
            f"{where}: init_lora_weights is {brief(begun)}: such factors belong to another base; convert them to plain "
            "LoRA when they are saved (path_initial_model_for_weight_conversion)"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: alpha_pattern: expected an object, found {brief(patterns)}")
    for pattern in patterns:
        try:
            re.compile(_module_pattern(pattern))
        except re.error as error:
            raise CheckpointError(f"{where}: alpha_pattern: {brief(pattern)}: no regular expression: {error}") from None


def _factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Returns each module's A and B. Any other tensor is of an adapter that is more than a product."""
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds adapter_model.bin, a pickle, which runs code when it is read; expected {WEIGHTS}"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(folder / WEIGHTS).items():
        match = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if match is None or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name!r} {list(tensor.shape)} is no factor lora_A or lora_B of a matrix"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    return found


def _module_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _scale(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """Returns alpha over the rank; the rank is that of the factors, whatever `r` and `rank_pattern` say."""
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for key, alpha in patterns.items() if re.match(_module_pattern(key), module))
    alpha = next(matching, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e300 or rank < 1:
        raise CheckpointError(f"{where}: lora_alpha: expected a number for {module} of rank {rank}, found {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _folded(weight: Tensor, a: Tensor, b: Tensor, scale: float, turned: bool, where: str) -> Tensor:
    shape = (b.shape[0], a.shape[1])
    expected = shape[::-1] if turned else shape
    if a.shape[0] != b.shape[1] or weight.shape != expected:
        raise CheckpointError(f"{where}: A {list(a.shape)} and B {list(b.shape)} do not fit {list(weight.shape)}")

    def read() -> np.ndarray:
        change = b.read().astype(np.float32) @ a.read().astype(np.float32)
        change = (change.T if turned else change) * np.float32(scale)
        with np.errstate(over="ignore"):  # who reads a tensor says what is not finite
            return (weight.read().astype(np.float32) + change).astype(weight.dtype)

    return Tensor(weight.shape, weight.dtype, read)
