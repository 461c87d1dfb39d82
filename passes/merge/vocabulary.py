"""One vocabulary for models that have several: their embeddings and output layers get a row for each of its tokens.

Only these tensors are touched, and each is made when it is read.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from xlathe.errors import CheckpointError, OptionError, did_you_mean
from xlathe.models.checkpoint import Checkpoint
from xlathe.passes.merge.united import united
from xlathe.safetensors_file import Tensor

BY_TOKEN: Final = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|embed_out|lm_head)\.(weight|bias)")
"""Tensors whose first axis counts tokens."""
ENDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Row:
    """Where the row of a token is taken from: that of a model's token, by its text or its id; None: zeros.

    force: for all models, else for those that do not know the token.
    """

    model: str | None
    token: str | int | None
    force: bool


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """source: "union", "base", or a model's name; multiple: of what the number of rows is."""

    source: str
    rows: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    multiple: int = 1


def unite(
    vocabulary: Vocabulary, models: Sequence[str], opened: Mapping[str, Checkpoint], where: str
) -> dict[str, Checkpoint]:
    """Returns the models with the vocabulary's tokenizer, and a row for each of its tokens in each.

    models: the base first, or what stands for it. A union keeps the base's ids; the tokens of others follow. A token
    that a model does not know has the base's row; where that has none, the mean of those that have one. Rows without a
    token are those of the model whose ids are kept, then the mean of its rows. Raises CheckpointError for a model
    without a tokenizer, or one of more tokens than rows (both numbers); OptionError for tokens that nobody has.
    """
    words = {model: _words(opened[model], model) for model in models}
    owner = models[0] if vocabulary.source in ("union", "base") else vocabulary.source
    if owner not in words:
        raise OptionError(
            f"{where}: tokenizer_source: no model {owner!r}{did_you_mean(owner, ['union', 'base', *models])}"
        )
    tokenizer = opened[owner].tokenizer
    if vocabulary.source == "union":
        tokenizer = united(tokenizer, {model: opened[model].tokenizer for model in models[1:]})
    ids = tokenizer.get_vocab()
    _check_rows(vocabulary, ids, words, where)
    tables = _Tables(vocabulary, ids, words, models[0], owner)
    return {model: _with_rows(model, tokenizer, tables, opened) for model in models}


@dataclasses.dataclass(frozen=True)
class _Tables:
    """ids: of the result's tokens; words: those of each model."""

    vocabulary: Vocabulary
    ids: Mapping[str, int]
    words: Mapping[str, Mapping[str, int]]
    base: str
    owner: str

    def count(self, held: int) -> int:
        """Returns how many rows there are in the result, of so many in the owner's tensor."""
        return -(-max(held, 1 + max(self.ids.values())) // self.vocabulary.multiple) * self.vocabulary.multiple


def _words(checkpoint: Checkpoint, model: str) -> dict[str, int]:
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer, so that its rows have no tokens to be ordered by")
    return dict(checkpoint.tokenizer.get_vocab())


def _check_rows(
    vocabulary: Vocabulary, ids: Mapping[str, int], words: Mapping[str, Mapping[str, int]], where: str
) -> None:
    for token, row in vocabulary.rows.items():
        if token not in ids:
            raise OptionError(f"{where}: tokenizer: tokens: the vocabulary has no token {token!r}")
        if row.model is None:
            continue
        if row.model not in words:
            raise OptionError(f"{where}: tokenizer: {token!r}: no model {row.model!r}{did_you_mean(row.model, words)}")
        if isinstance(row.token, str) and row.token not in words[row.model]:
            raise OptionError(f"{where}: tokenizer: {token!r}: {row.model} has no token {row.token!r}")


def _with_rows(model: str, tokenizer: Any, tables: _Tables, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    tensors = {
        name: tensor if BY_TOKEN.search(name) is None else _with_tokens(name, model, tables, opened)
        for name, tensor in opened[model].tensors.items()
    }
    card = _card(model, tables, opened, tensors)
    return dataclasses.replace(opened[model], card=card, tensors=tensors, tokenizer=tokenizer)


def _with_tokens(name: str, model: str, tables: _Tables, opened: Mapping[str, Checkpoint]) -> Tensor:
    own, held = opened[model].tensors[name], {}
    for each, words in tables.words.items():
        if name not in opened[each].tensors:
            raise CheckpointError(f"{each} has no tensor {name!r}, which {model} has")
        held[each], tokens = opened[each].tensors[name], 1 + max(words.values())
        if tokens > held[each].shape[0]:
            raise CheckpointError(f"{each} has {tokens} tokens, and {name} {held[each].shape[0]} rows")
        if held[each].shape[1:] != own.shape[1:]:
            found = list(held[each].shape)
            raise CheckpointError(f"{name} is {list(own.shape)} in {model} and {found} in {each}: rows differ in width")
    shape = (tables.count(held[tables.owner].shape[0]), *own.shape[1:])
    return Tensor(shape, own.dtype, functools.partial(_read_rows, model, shape, tables, held))


def _read_rows(model: str, shape: tuple[int, ...], tables: _Tables, held: Mapping[str, Tensor]) -> np.ndarray:
    """Returns a model's rows in the result's order; see `unite`."""
    own, result = held[model].read(), np.empty(shape, held[model].dtype)
    owner = held[tables.owner].read()
    result[: len(owner)] = owner[: len(result)].astype(result.dtype, copy=False)
    if len(result) > len(owner):
        result[len(owner) :] = owner.astype(np.float32).mean(axis=0)
    known, words = tables.words, tables.words[model]
    _gather(result, own, [(i, words[token]) for token, i in tables.ids.items() if token in words])
    missing = {token: i for token, i in tables.ids.items() if token not in words}
    base = known[tables.base]
    _gather(result, held[tables.base].read(), [(i, base[token]) for token, i in missing.items() if token in base])
    orphans = {token: i for token, i in missing.items() if token not in base}
    if orphans:
        _mean_of_others(result, orphans, tables, held)
    for token, row in tables.vocabulary.rows.items():
        if row.force or token not in words:
            result[tables.ids[token]] = _given(row, known, held)
    return result


def _gather(result: np.ndarray, source: np.ndarray, pairs: Sequence[tuple[int, int]]) -> None:
    if pairs:
        to, from_ = np.array(pairs).T
        result[to] = source[from_].astype(result.dtype, copy=False)


def _mean_of_others(
    result: np.ndarray, orphans: Mapping[str, int], tables: _Tables, held: Mapping[str, Tensor]
) -> None:
    """Gives tokens the mean of the rows of models that have them, in float32."""
    places = {token: n for n, token in enumerate(orphans)}
    total, count = np.zeros((len(orphans), *result.shape[1:]), np.float32), np.zeros(len(orphans), np.int32)
    for each, words in tables.words.items():
        pairs = [(n, words[token]) for token, n in places.items() if token in words]
        if pairs:
            to, from_ = np.array(pairs).T
            total[to] += held[each].read()[from_].astype(np.float32)
            count[to] += 1
    result[list(orphans.values())] = total / count.reshape(-1, *[1] * (total.ndim - 1))


def _given(row: Row, words: Mapping[str, Mapping[str, int]], held: Mapping[str, Tensor]) -> np.ndarray | float:
    if row.model is None:
        return 0.0
    token = words[row.model][row.token] if isinstance(row.token, str) else row.token
    source = held[row.model]
    if token is None or token >= source.shape[0]:
        raise CheckpointError(f"{row.model} has {source.shape[0]} rows, and token {token} is asked for")
    return source.read()[token].astype(np.float32)


def _card(model: str, tables: _Tables, opened: Mapping[str, Checkpoint], tensors: Mapping[str, Tensor]) -> Any:
    """Returns a card with the number of rows, and of the owner what tells tokens by their ids or texts."""
    card, owner = opened[model].card, opened[tables.owner].card
    config = {key: value for key, value in card.config.items() if key not in ENDS}
    config |= {key: owner.config[key] for key in ENDS if key in owner.config}
    rows = [tensor.shape[0] for name, tensor in tensors.items() if BY_TOKEN.search(name)]
    config |= {"vocab_size": rows[0]} if rows else {}
    return dataclasses.replace(
        card,
        config=config,
        generation=owner.generation,
        chat_template=owner.chat_template,
        special_tokens=owner.special_tokens,
    )
