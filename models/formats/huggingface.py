"""A Hugging Face directory: `config.json`, `generation_config.json`, safetensors in one file or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlathe.card import Card
from xlathe.errors import CheckpointError
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.safetensors import read_safetensors

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_huggingface(folder: Path) -> Checkpoint:
    """Reads a directory; tensors stay on disk, mapped.

    Raises CheckpointError, naming file and tensor, for what is missing or malformed. Nothing is unpickled, and code
    that a configuration names (`auto_map`) is never run.
    """
    config = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    return Checkpoint(Card(config, generation), _tensors(folder), str(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises CheckpointError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    if (folder / INDEX).exists():
        return _shards(folder)
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds {pickled[0]}, a pickle, which runs code when it is read, and no {WEIGHTS}. Convert it "
            'where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


def _shards(folder: Path) -> dict[str, Tensor]:
    """Reads the shards that the index names, each tensor from the shard that it is said to lie in."""
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map: expected an object of file names")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or shard in (".", ".."):
            raise CheckpointError(f"{folder / INDEX}: {shard!r} is no file name")
        found = read_safetensors(folder / shard)
        for name in found:
            if places.get(name) != shard:
                said = f"the index says {places[name]}" if name in places else f"{INDEX} does not list it"
                raise CheckpointError(f"{folder / shard} holds {name!r}: {said}")
        tensors |= found
    missing = [name for name in places if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder / places[missing[0]]} has no tensor {missing[0]!r}, which {INDEX} puts there")
    return tensors
