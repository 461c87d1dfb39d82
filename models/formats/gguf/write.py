"""From a checkpoint in Hugging Face's vocabulary to a GGUF file, as llama.cpp's converter writes it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from absl import logging
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType

from xlathe.card import Card
from xlathe.errors import CheckpointError, OptionError, as_path, did_you_mean
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.gguf.architecture import Architecture, write_keys
from xlathe.models.formats.gguf.architectures import BY_MODEL_TYPE
from xlathe.models.formats.gguf.blocks import ENCODED
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.importance import Importance
from xlathe.models.formats.gguf.mixes import EMBEDDINGS, MIXES, OUTPUT, Counts, types_of
from xlathe.models.formats.gguf.read import TEMPLATE, TOKENS
from xlathe.models.formats.gguf.rules import Planned
from xlathe.models.formats.gguf.writer import Progress, Typed, write_container
from xlathe.models.formats.gguf_tokenizer import metadata_of

Type = GGMLQuantizationType
UNUSED_TOKEN: Final = 5  # of tokenizer.ggml.token_type
UNUSED: Final = (".rotary_emb.inv_freq",)  # buffers that old checkpoints carry


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be in a file: metadata by full keys, tensors in their order. before: bytes that each is read from."""

    metadata: Mapping[str, Any]
    tensors: tuple[Typed, ...]
    before: tuple[int, ...]

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / sum(math.prod(tensor.plan.shape) for tensor in self.tensors)


def write_gguf(
    checkpoint: Checkpoint,
    path: Any,
    type: str = "Q8_0",
    progress: Progress = lambda done, total: None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Plans and writes a file; errors as of `plan_gguf` and `write_plan`."""
    write_plan(plan_gguf(checkpoint, type, extra), path, progress)


def check_type(type: str) -> None:
    """Raises OptionError for what is no name in `MIXES`."""
    if type not in MIXES:
        raise OptionError(f"type: no type {type!r} to write{did_you_mean(type, MIXES)}")


def write_plan(plan: Plan, path: Any, progress: Progress = lambda done, total: None) -> None:
    """Writes the file `path`, a tensor at a time; the file is there when it is whole.

    Raises CheckpointError where it cannot be written, and names a tensor whose numbers are not finite or do not fit.
    """
    write_container(as_path(path, CheckpointError), plan.metadata, plan.tensors, progress)


def plan_gguf(
    checkpoint: Checkpoint,
    type: str = "Q8_0",
    extra: Mapping[str, Any] | None = None,
    importance: Importance | None = None,
) -> Plan:
    """Returns what a file of a checkpoint will hold. Nothing but shapes and settings is read.

    type: a name in `MIXES`, by which `types_of` chooses. extra: more metadata, such as a tokenizer's, by full keys.
    importance: weights of the squared errors, by names of the file's tensors; those without are rounded as if none
    were known. Raises CheckpointError for a family that GGUF or this writer does not know, settings that it cannot
    say, tensors without a place, and importance that fits no tensor; OptionError for an unknown type.
    """
    check_type(type)
    config = checkpoint.card.config
    architecture = BY_MODEL_TYPE.get(str(config.get("model_type")))
    if architecture is None:
        known = did_you_mean(str(config.get("model_type")), BY_MODEL_TYPE)
        raise CheckpointError(f"{checkpoint.where}: no GGUF form of the model type {config.get('model_type')!r}{known}")
    try:
        metadata = {**_metadata(architecture, checkpoint.card, type), **_text(checkpoint), **(extra or {})}
        named = _named(architecture, checkpoint.tensors, config)
        plans = list(_plans(architecture, named, config))
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.where}: config: expected {error.args[0]!r}, found none") from None
    types = types_of(type, {plan.name: plan.shape for plan in plans}, _counts(metadata), importance is not None)
    weights = _weights(plans, types, importance or {})
    if type == "Q2_K_S":
        _check_q2_k_s(types, weights)
    tensors = tuple(Typed(plan, types[plan.name], weights.get(plan.name)) for plan in plans)
    before = tuple(sum(named[source].nbytes for source in plan.sources) for plan in plans)
    return Plan(metadata, tensors, before)


def _counts(metadata: Mapping[str, Any]) -> Counts:
    name = metadata["general.architecture"]

    def first(key: str, default: int = 0) -> int:
        found = metadata.get(f"{name}.{key}", default)
        return int(found if np.ndim(found) == 0 else found[0])

    heads = first("attention.head_count")
    return Counts(name, first("block_count"), heads, first("attention.head_count_kv", heads), first("expert_count"))


def _weights(plans: list[Planned], types: Mapping[str, Type], importance: Importance) -> dict[str, np.ndarray]:
    """Returns the importance of the tensors that are encoded in blocks and have one."""
    found = {}
    for plan in plans:
        if plan.name in importance and types[plan.name] in ENCODED:
            size, expected = importance[plan.name].size, math.prod(plan.shape[:-2]) * plan.shape[-1]
            if size == expected:
                found[plan.name] = importance[plan.name].reshape(-1, plan.shape[-1])
            elif plan.name not in EMBEDDINGS:  # llama.cpp's tool writes one of another size there
                raise CheckpointError(f"importance of {plan.name!r}: expected {expected} weights, found {size}")
    if importance and not any(types[plan.name] in ENCODED for plan in plans):
        raise CheckpointError("importance: expected a type in blocks, found none whose errors could be weighed")
    if importance and not found:
        raise CheckpointError(f"importance: expected names such as {plans[-1].name!r}, found {min(importance)!r}")
    return found


def _check_q2_k_s(types: Mapping[str, Type], weights: Mapping[str, np.ndarray]) -> None:
    for name, type in types.items():
        if type is Type.Q2_K and name not in weights and name not in (*EMBEDDINGS, OUTPUT):
            expected = "expected its importance (--imatrix), as Q2_K_S needs it"
            raise CheckpointError(f"tensor {name!r}: {expected}, found none; Q2_K does without")


def _metadata(architecture: Architecture, card: Card, type: str) -> dict[str, Any]:
    return {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.file_type": int(MIXES[type][1]),
        "general.quantization_version": GGML_QUANT_VERSION,
        # llama.cpp wants to be told that there is no tokenizer, and then the number of tokens
        "tokenizer.ggml.model": "none",
        f"{architecture.name}.vocab_size": int(card.config["vocab_size"]),
        **({"tokenizer.ggml.token_type_count": types} if (types := card.config.get("type_vocab_size")) else {}),
        **write_keys(architecture, card.config),
        **_token_ids(card),
        **({} if card.chat_template is None else {TEMPLATE: card.chat_template}),
    }


def _text(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what a file says of its tokenizer; nothing, with a warning, where GGUF has no words for it."""
    if checkpoint.tokenizer is None:
        return {}
    try:
        return _padded(metadata_of(checkpoint.tokenizer, checkpoint.card), int(checkpoint.card.config["vocab_size"]))
    except CheckpointError as error:
        logging.warning("%s is written without its tokenizer: %s", checkpoint.where, error)
        return {}


def _padded(text: dict[str, Any], rows: int) -> dict[str, Any]:
    """Returns the lists with a token for each row of the embedding: llama.cpp counts rows by them."""
    items: dict[str, list[Any]] = {
        "tokens": [f"[PAD{i}]" for i in range(rows)],
        "scores": [-10000.0] * rows,
        "token_type": [UNUSED_TOKEN] * rows,
    }
    lists = {f"tokenizer.ggml.{name}": padding for name, padding in items.items()}
    padded = {key: [*text[key], *padding[len(text[key]) :]] for key, padding in lists.items() if key in text}
    return {**text, **padded}


def _token_ids(card: Card) -> dict[str, int]:
    key = "tokenizer.ggml.{}_token_id"
    ids = {key.format(name): card.config.get(hf) for hf, name in TOKENS.items() if hf != "eos_token_id"}
    stop = card.stop_tokens
    ids |= {key.format(name): value for name, value in zip(("eos", "eot"), stop[:1] + stop[1:][-1:], strict=False)}
    return {name: value for name, value in ids.items() if isinstance(value, int) and value >= 0}


def _plans(architecture: Architecture, names: Mapping[str, Tensor], config: Config) -> Iterator[Planned]:
    """Yields the tensors of the file. Raises CheckpointError for one of the checkpoint's that has no place in it."""
    used: set[str] = set()
    layers = next(config[key.hf] for key in architecture.keys if key.name == "block_count")
    for rules, count in ((architecture.once, 1), (architecture.block, layers)):
        for b in range(count):
            for rule in rules:
                for plan in rule.write(names, config, b):
                    used.update(plan.sources)
                    yield plan
    for name, array in architecture.tensors(config).items():
        yield Planned(name, array.shape, (lambda array=array: array,), ())  # type: ignore[misc]
    for name in names:
        if name not in used:
            raise CheckpointError(f"tensor {name!r}: GGUF's {architecture.name} has no place for it")


def _named(architecture: Architecture, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Returns the tensors that have a place, by the names of a model with a head."""
    ahead = range(config.get("num_nextn_predict_layers") or 0)  # layers that predict further tokens
    dropped = (*architecture.dropped, *UNUSED, *(f"model.layers.{config['num_hidden_layers'] + i}." for i in ahead))
    if config.get("tie_word_embeddings"):
        dropped = (*dropped, "lm_head.weight", "embed_out.weight")
    bare = {name.removeprefix("bert.") if architecture.name == "bert" else name: t for name, t in tensors.items()}
    prefix = "" if any(name.startswith(architecture.prefix) for name in bare) else architecture.prefix
    named = {name if name.startswith(("lm_head.", "embed_out.")) else prefix + name: t for name, t in bare.items()}
    return {name: t for name, t in named.items() if not name.startswith(dropped) and not name.endswith(dropped)}
