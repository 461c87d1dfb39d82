"""From a checkpoint in Hugging Face's vocabulary to a GGUF file, as llama.cpp's converter writes it."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from absl import logging
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType

from xlathe.card import Card
from xlathe.errors import CheckpointError, OptionError, as_path, did_you_mean
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.gguf.architecture import Architecture, write_keys
from xlathe.models.formats.gguf.architectures import BY_MODEL_TYPE
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.read import TEMPLATE, TOKENS
from xlathe.models.formats.gguf.rules import Planned
from xlathe.models.formats.gguf.writer import Progress, Typed, write_container
from xlathe.models.formats.gguf_tokenizer import metadata_of

Type = GGMLQuantizationType
FILE_TYPES: Final = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
TYPES: Final = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16, "Q8_0": Type.Q8_0}
# What llama.cpp only computes with in float32, beside norms and biases.
FLOAT32: Final = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "_norm.weight")
UNUSED_TOKEN: Final = 5  # of tokenizer.ggml.token_type
UNUSED: Final = (".rotary_emb.inv_freq",)  # buffers that old checkpoints carry


def write_gguf(
    checkpoint: Checkpoint,
    path: Any,
    type: str = "Q8_0",
    progress: Progress = lambda done, total: None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint to the file `path`, a tensor at a time; the file is there when it is whole.

    type: of matrices, F32, F16, BF16 or Q8_0; norms, biases and routers are F32, and matrices whose rows are no whole
    blocks of Q8_0 are F16. extra: more metadata, such as a tokenizer's, by full keys. Raises CheckpointError for a
    family that GGUF or this writer does not know, settings that it cannot say, and tensors without a place.
    """
    path = as_path(path, CheckpointError)
    if type not in FILE_TYPES:
        raise OptionError(f"type: no type {type!r} to write{did_you_mean(type, FILE_TYPES)}")
    config = checkpoint.card.config
    architecture = BY_MODEL_TYPE.get(str(config.get("model_type")))
    if architecture is None:
        known = did_you_mean(str(config.get("model_type")), BY_MODEL_TYPE)
        raise CheckpointError(f"{checkpoint.where}: no GGUF form of the model type {config.get('model_type')!r}{known}")
    try:
        metadata = {**_metadata(architecture, checkpoint.card, type), **_text(checkpoint)}
        plans = list(_plans(architecture, checkpoint.tensors, config))
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.where}: config: expected {error.args[0]!r}, found none") from None
    tensors = [Typed(plan, _type_of(plan, TYPES[type])) for plan in plans]
    write_container(path, {**metadata, **(extra or {})}, tensors, progress)


def _metadata(architecture: Architecture, card: Card, type: str) -> dict[str, Any]:
    return {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.file_type": int(FILE_TYPES[type]),
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


def _plans(architecture: Architecture, tensors: Mapping[str, Tensor], config: Config) -> Iterator[Planned]:
    """Yields the tensors of the file. Raises CheckpointError for one of the checkpoint's that has no place in it."""
    names = _named(architecture, tensors, config)
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


def _type_of(plan: Planned, type: Type) -> Type:
    if len(plan.shape) <= 1 or not plan.name.endswith(".weight") or plan.name.endswith(FLOAT32):
        return Type.F32
    return type if plan.shape[-1] % GGML_QUANT_SIZES[type][0] == 0 else Type.F16
