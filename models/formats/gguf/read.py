"""From a GGUF file to a checkpoint in Hugging Face's vocabulary."""

import re
import types
from collections.abc import Iterator
from typing import Any, Final

from absl import logging

from xlathe.card import Card
from xlathe.errors import CheckpointError, did_you_mean
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.gguf.architecture import Architecture, read_config
from xlathe.models.formats.gguf.architectures import BY_NAME
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.container import Container, open_container
from xlathe.models.formats.gguf.header import Header, lookup
from xlathe.models.formats.gguf.rope import FREQUENCIES, LONG, SHORT
from xlathe.models.formats.gguf.rules import Found
from xlathe.models.formats.gguf.values import ALIGNMENT
from xlathe.models.formats.gguf_tokenizer import tokenizer_of

TOKENS: Final = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
TEMPLATE: Final = "tokenizer.chat_template"
OWN: Final = ("general.architecture", "general.type", "general.file_type", "general.quantization_version", ALIGNMENT)
"""Keys that say how a file is written."""


def read_gguf(path: Any) -> Checkpoint:
    """Opens a GGUF file; tensors are read when they are asked for, plain ones as views of the mapped file.

    Raises CheckpointError for a file that is damaged, or of an architecture that is not known.
    """
    return as_checkpoint(open_container(path))


def as_checkpoint(file: Container) -> Checkpoint:
    """Returns what a file holds under Hugging Face's names."""
    architecture = _architecture(file)
    _layers(file)  # before anything is counted by what the metadata alone say
    config = {**read_config(architecture, Header(file, architecture.name)), **_token_ids(file)}
    tensors: dict[str, Tensor] = {}
    used = {FREQUENCIES, LONG, SHORT}
    for hf, tensor, names in _found(architecture, file, config):
        if hf in tensors:
            raise CheckpointError(f"{file.path}: tensors {', '.join(names)}: {hf!r} is there in another form too")
        tensors[hf] = tensor
        used.update(names)
    for name in file.entries:
        if name not in used:
            raise CheckpointError(f"{file.path}: tensor {name!r}: expected none of this name in {architecture.name}")
    template = lookup(file, TEMPLATE, str)
    card = Card(config, chat_template=template)
    return Checkpoint(card, types.MappingProxyType(tensors), str(file.path), _tokenizer(file), _passed_on(file))


def _passed_on(file: Container) -> dict[str, Any]:
    """Returns what a file says of its tokenizer and its origin, which stays true in another type."""
    kept = {key: v for key, v in file.metadata.items() if key.startswith(("general.", "tokenizer."))}
    return {key: v for key, v in kept.items() if key not in OWN}


def _tokenizer(file: Container) -> Any:
    """Returns the tokenizer; None, with a warning, where it is of a kind that is not known: the weights still are."""
    try:
        return tokenizer_of(file.metadata)
    except CheckpointError as error:
        logging.warning("%s is read without its tokenizer: %s", file.path, error)
        return None


def _architecture(file: Container) -> Architecture:
    name = lookup(file, "general.architecture", str)
    if name not in BY_NAME:
        raise CheckpointError(f"{file.path}: no architecture {name!r}{did_you_mean(str(name), BY_NAME)}")
    if (parts := lookup(file, "split.count", int, 1)) > 1:
        raise CheckpointError(f"{file.path}: expected a whole model, found one of {parts} files; merge them first")
    return BY_NAME[name]


def _found(architecture: Architecture, file: Container, config: Config) -> Iterator[Found]:
    for rule in architecture.once:
        yield from rule.read(file, config, 0)
    for b in range(_layers(file)):
        for rule in architecture.block:
            yield from rule.read(file, config, b)


def _layers(file: Container) -> int:
    """Returns the number of layers, each of which has tensors: a number from the metadata alone is not looped over."""
    there = {found[1] for name in file.entries if (found := re.match(r"blk\.(0|[1-9]\d{0,9})\.", name))}
    layers = Header(file, lookup(file, "general.architecture", str)).need("block_count", int)
    if there != set(map(str, range(min(layers, len(there) + 1)))):
        missing = next((b for b in range(min(layers, len(there) + 1)) if str(b) not in there), None)
        which = "" if missing is None else f"; the first without any is {missing}"
        raise CheckpointError(f"{file.path}: expected tensors of {layers} layers, found {len(there)}{which}")
    return layers


def _token_ids(file: Container) -> dict[str, Any]:
    """Returns the ids of special tokens; what ends a turn of a chat ends a text too."""
    key = "tokenizer.ggml.{}_token_id"
    ids = {hf: lookup(file, key.format(name), int) for hf, name in TOKENS.items()}
    turn = lookup(file, key.format("eot"), int)
    if turn is not None and ids["eos_token_id"] not in (None, turn):
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return {hf: value for hf, value in ids.items() if value is not None}
