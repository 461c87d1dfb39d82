"""A Hugging Face directory: `config.json`, `generation_config.json`, safetensors in one file or in shards."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xlathe.card import Card
from xlathe.errors import CheckpointError
from xlathe.files import written_together
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.json_file import read_json
from xlathe.models.formats.tokenizer import (
    FILES,
    SETTINGS,
    TOKENIZER,
    read_chat_template,
    read_special_tokens,
    read_tokenizer,
)
from xlathe.models.settings import Settings
from xlathe.safetensors_file import read_safetensors, write_safetensors

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a directory holds of a model, the configuration first.
OWNED = (CONFIG, GENERATION, WEIGHTS, INDEX, *FILES, "model-*-of-*.safetensors")
QUANTIZATION = "quantization_config"
METADATA = {"format": "pt"}  # without which transformers refuses a file
SHARD = 5_000_000_000  # bytes, at most, but for a tensor that is larger: as transformers has it


def read_huggingface(folder: Path) -> Checkpoint:
    """Reads a directory; tensors stay on disk, mapped.

    Raises CheckpointError, naming file and tensor, for what is missing or malformed. Nothing is unpickled, and code
    that a configuration names (`auto_map`) is never run.
    """
    config = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    tensors: Mapping[str, Tensor] = _tensors(folder)
    notes: tuple[str, ...] = ()
    quantized = Settings(config, str(folder / CONFIG))
    if quantized.has(QUANTIZATION):
        from xlathe.models.formats.layouts import read_layout

        found = read_layout(quantized.within(QUANTIZATION), tensors, str(folder))
        tensors, notes = found.tensors, found.notes
        config = {name: value for name, value in config.items() if name != QUANTIZATION}
    card = Card(config, generation, read_chat_template(folder), read_special_tokens(folder))
    return Checkpoint(card, tensors, str(folder), read_tokenizer(folder), notes=notes)


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


def write_huggingface(
    checkpoint: Checkpoint, folder: Path, wrote: Callable[[int], None] = lambda size: None, shard: int = SHARD
) -> None:
    """Writes a directory that `transformers` loads, tensor by tensor, in files of at most `shard` bytes.

    All of them take their places at the end, and what another checkpoint left there goes; so a run that fails leaves
    the directory as it was. wrote: told the bytes of each tensor. Raises CheckpointError where the directory cannot be
    written.
    """
    try:
        with written_together(folder, OWNED) as fresh:
            _write_files(checkpoint, fresh, wrote, shard)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None


def _write_files(checkpoint: Checkpoint, folder: Path, wrote: Callable[[int], None], shard: int) -> None:
    _write_tensors(checkpoint.tensors, folder, wrote, shard)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(str(folder / TOKENIZER))
        _write_json(_text_settings(checkpoint.card), folder / SETTINGS)
    if checkpoint.card.generation:
        _write_json(checkpoint.card.generation, folder / GENERATION)
    _write_json(checkpoint.card.config, folder / CONFIG)


def _text_settings(card: Card) -> dict[str, Any]:
    template = {} if card.chat_template is None else {"chat_template": card.chat_template}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **card.special_tokens, **template}


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, wrote: Callable[[int], None], shard: int) -> None:
    shards = list(_split(tensors, shard))
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0], wrote, METADATA)
        return
    places: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, part, wrote, METADATA)
        places |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json({"metadata": {"total_size": total}, "weight_map": places}, folder / INDEX)


def _split(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(held.nbytes for held in part.values()) + tensor.nbytes > limit:
            yield part
            part = {}
        part[name] = tensor
    yield part


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
