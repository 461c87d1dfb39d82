"""The union of tokenizers: one's tokens with their ids, then those that others have beside."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from xlathe.errors import CheckpointError


def united(first: Tokenizer, others: Mapping[str, Tokenizer]) -> Tokenizer:
    """Returns a tokenizer of all tokens. The first keeps its ids, its way to cut texts, and its special tokens.

    Of others come the tokens that are missing, in the order of their ids, with the merges that make them, after all
    merges before, so that texts give them too; and added tokens as such. Raises CheckpointError, naming the model, for
    tokenizers whose models are no byte-pair encodings (but for those of equal vocabularies), or of other decoders.
    """
    result = json.loads(first.to_str())
    ids, before = dict(first.get_vocab()), first.get_vocab()
    added = {each["content"] for each in result["added_tokens"]}
    merges = _merges(result)
    for name, other in others.items():
        theirs, words = json.loads(other.to_str()), other.get_vocab()
        new = sorted((token for token in words if token not in ids), key=words.__getitem__)
        special = {each["content"]: each for each in theirs["added_tokens"]}
        if any(token not in special for token in new):
            _check_alike(result, theirs, name)
        ids |= {token: number for number, token in enumerate(new, 1 + max(ids.values()))}
        merges |= {pair: None for pair in _merges(theirs) if "".join(pair) in ids and "".join(pair) not in before}
        result["added_tokens"] += [{**special[token], "id": ids[token]} for token in special if token not in added]
        added |= special.keys()
    if len(ids) == len(before) and len(added) == len(json.loads(first.to_str())["added_tokens"]):
        return first
    return _made(result, ids, merges)


def _made(result: dict[str, Any], ids: Mapping[str, int], merges: Mapping[tuple[str, ...], None]) -> Tokenizer:
    """Added tokens get their ids from the vocabulary, so it holds all of them."""
    model = result["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    if "merges" in model:
        model["merges"] = [list(pair) for pair in merges]
    result["added_tokens"].sort(key=lambda each: each["id"])
    made = Tokenizer.from_str(json.dumps(result))
    if made.get_vocab() != ids:
        raise CheckpointError("the union of the tokenizers cannot be written: tokens would have other ids")
    return made


def _merges(data: Mapping[str, Any]) -> dict[tuple[str, ...], None]:
    listed = data["model"].get("merges") or []
    return {tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair): None for pair in listed}


def _check_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    kinds = [each["model"]["type"] for each in (ours, theirs)]
    if kinds != ["BPE", "BPE"]:
        raise CheckpointError(
            f"tokenizer_source=union: expected byte-pair encodings, found {kinds[1]} in {name} and {kinds[0]}"
        )
    ways = [(each.get("decoder") or {}).get("type") for each in (ours, theirs)]
    if ways[0] != ways[1]:
        raise CheckpointError(
            f"tokenizer_source=union: tokens are spelled in other ways, {ways[1]} in {name} and {ways[0]}"
        )
