"""Directories with other tensors and settings than were written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xlathe.safetensors_file import Tensor, read_safetensors, write_safetensors


def rewrite(
    folder: Path,
    arrays: Callable[[dict[str, np.ndarray]], Any] = lambda held: None,
    settings: Callable[[dict[str, Any]], Any] = lambda said: None,
) -> Path:
    """Changes the tensors of a directory and its `quantization_config` in place."""
    held = {name: tensor.read().copy() for name, tensor in read_safetensors(folder / "model.safetensors").items()}
    arrays(held)
    write_safetensors(
        folder / "model.safetensors", {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in held.items()}
    )
    config = json.loads((folder / "config.json").read_text())
    settings(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder
