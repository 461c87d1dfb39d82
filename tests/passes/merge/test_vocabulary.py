"""Embeddings in one order of tokens, and one tokenizer for all, beside rows looked up by their texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from xlathe.card import Card
from xlathe.errors import CheckpointError, OptionError
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.huggingface import read_huggingface, write_huggingface
from xlathe.passes.merge.merge import merge
from xlathe.passes.merge.recipe import parse_recipe
from xlathe.passes.merge.united import united
from xlathe.safetensors_file import Tensor

WIDTH = 4
NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def byte_pairs(tokens: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def model(seed: int, tokenizer: Tokenizer, rows: int, **config: Any) -> Checkpoint:
    rng = np.random.default_rng(seed)
    shapes = {NAMES[0]: (rows, WIDTH), "model.layers.0.mlp.weight": (3, WIDTH), NAMES[1]: (rows, WIDTH)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    settings = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": rows, **config}
    return Checkpoint(Card(settings, {"eos_token_id": seed}), tensors, f"m{seed}", tokenizer)


BASE = byte_pairs(["a", "b", "c", "ab"], [("a", "b")], ["<s>"])
A = byte_pairs(["c", "b", "a", "bc", "abc"], [("b", "c"), ("a", "bc")], ["<s>", "<|turn|>"])
B = byte_pairs(["a", "b", "c", "ab", "abc"], [("a", "b"), ("ab", "c")], ["<|turn|>"])
MODELS = {"base": model(0, BASE, 5, bos_token_id=4), "a": model(1, A, 7, bos_token_id=5), "b": model(2, B, 8)}
UNION = ["a", "b", "c", "ab", "<s>", "bc", "abc", "<|turn|>"]


def recipe_of(**more: Any) -> dict[str, Any]:
    listed = [{"model": name, "parameters": {"weight": weight}} for name, weight in {"a": 0.5, "b": 0.25}.items()]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": listed, **more}


def merged(opened: Mapping[str, Checkpoint] = MODELS, **more: Any) -> Checkpoint:
    return merge(parse_recipe(recipe_of(**more), "recipe"), opened)


def rows(name: str, tensor: str) -> dict[str, np.ndarray]:
    array = MODELS[name].tensors[tensor].read()
    return {token: array[i] for token, i in MODELS[name].tokenizer.get_vocab().items()}


def expected(token: str, tensor: str) -> np.ndarray:
    """Of the three models' rows, what task arithmetic makes; a model without the token has the base's, or the mean."""
    known = {name: rows(name, tensor)[token] for name in MODELS if token in rows(name, tensor)}
    mean = np.mean([row for name, row in known.items() if name != "base"] or [0], axis=0)
    base = known.get("base", mean)
    return base + 0.5 * (known.get("a", base) - base) + 0.25 * (known.get("b", base) - base)


@pytest.mark.parametrize("tensor", NAMES)
@pytest.mark.parametrize("order", [MODELS, dict(reversed(MODELS.items()))], ids=["in order", "turned"])
def test_rows_of_a_union_are_those_of_its_tokens(tensor: str, order: Mapping[str, Checkpoint]) -> None:
    found = merged(order, tokenizer_source="union")
    ids = found.tokenizer.get_vocab()
    assert sorted(ids, key=ids.__getitem__) == UNION
    array = found.tensors[tensor].read()
    assert array.shape == (8, WIDTH) and found.card.config["vocab_size"] == 8
    for token, i in ids.items():
        np.testing.assert_allclose(array[i], expected(token, tensor), atol=1e-6, err_msg=token)


def test_texts_give_the_tokens_of_all() -> None:
    """Merges of others come after all before: what the first does with a text is done first."""
    tokenizer = merged(tokenizer_source="union").tokenizer
    assert tokenizer.encode("abc").tokens == ["abc"] and tokenizer.encode("bc").tokens == ["bc"]
    assert tokenizer.encode("<s>ab<|turn|>c").tokens == ["<s>", "ab", "<|turn|>", "c"]
    assert tokenizer.decode(tokenizer.encode("<|turn|>abcab").ids) == "abcab"  # what is special stays so
    assert BASE.encode("abc").tokens == ["ab", "c"]


def test_tokens_of_the_first_are_made_as_it_makes_them() -> None:
    """Another's way to one of its tokens would change texts that it reads already."""
    first = byte_pairs(["a", "b", "c", "ab", "bc", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")])
    other = byte_pairs(["a", "b", "c", "bc", "abc", "d"], [("b", "c"), ("a", "bc")])
    tokenizer = united(first, {"other": other})
    assert tokenizer.encode("abcd").tokens == [*first.encode("abc").tokens, "d"] == ["a", "bc", "d"]


def test_one_models_vocabulary() -> None:
    """Expected: its ids, its special tokens and its rows; tokens that it does not know are gone."""
    for source, owner in {"a": "a", "base": "base"}.items():
        found = merged(tokenizer_source=source)
        assert found.tokenizer.get_vocab() == MODELS[owner].tokenizer.get_vocab()
        assert found.card.generation == MODELS[owner].card.generation
        assert found.card.config["bos_token_id"] == MODELS[owner].card.config["bos_token_id"]
        for tensor in NAMES:
            array = found.tensors[tensor].read()
            assert len(array) == MODELS[owner].tensors[tensor].shape[0] == found.card.config["vocab_size"]
            for token, i in found.tokenizer.get_vocab().items():
                np.testing.assert_allclose(array[i], expected(token, tensor), atol=1e-6, err_msg=token)


def test_rows_without_a_token() -> None:
    """The base's where it has them; beyond them, to a multiple, the mean of its rows."""
    padded = MODELS | {"base": model(0, BASE, 10)}
    found = merged(padded, tokenizer={"source": "union", "pad_to_multiple_of": 8}).tensors[NAMES[0]].read()
    base = padded["base"].tensors[NAMES[0]].read()
    assert found.shape == (16, WIDTH)
    np.testing.assert_allclose(found[8:10], base[8:], atol=1e-6)
    np.testing.assert_allclose(found[10:], np.broadcast_to(base.mean(axis=0), (6, WIDTH)), atol=1e-6)


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"source": "b", "force": True}, lambda: rows("b", NAMES[0])["<|turn|>"]),
        ({"source": {"kind": "zero"}, "force": True}, lambda: np.zeros(WIDTH)),
        (
            {"source": {"kind": "model_token", "model": "base", "token": "ab"}, "force": True},
            lambda: rows("base", NAMES[0])["ab"],
        ),
        (
            {"source": {"kind": "model_token", "model": "a", "token_id": 3}, "force": True},
            lambda: MODELS["a"].tensors[NAMES[0]].read()[3],
        ),
    ],
    ids=["a model's", "zeros", "another token's", "an id's"],
)
def test_a_row_that_the_recipe_names(row: dict[str, Any], chosen: Any) -> None:
    """Forced, all models have it, and so has the result; else only those that do not know the token."""
    found = merged(tokenizer={"source": "union", "tokens": {"<|turn|>": row}})
    at = found.tokenizer.token_to_id("<|turn|>")
    np.testing.assert_allclose(found.tensors[NAMES[0]].read()[at], chosen(), atol=1e-6)
    free = merged(tokenizer={"source": "union", "tokens": {"<|turn|>": row | {"force": False}}})
    known = [rows(name, NAMES[0])["<|turn|>"] for name in ("a", "b")]
    result = chosen() + 0.5 * (known[0] - chosen()) + 0.25 * (known[1] - chosen())
    np.testing.assert_allclose(free.tensors[NAMES[0]].read()[at], result, atol=1e-6)


def test_equal_vocabularies_change_nothing() -> None:
    opened = dict.fromkeys(MODELS, MODELS["a"])
    found = merged(opened, tokenizer_source="union")
    assert found.tokenizer is A
    for name, tensor in found.tensors.items():
        np.testing.assert_allclose(tensor.read(), MODELS["a"].tensors[name].read(), atol=1e-6)


def test_a_union_is_written_and_read_again(tmp_path: Path) -> None:
    found = merged(tokenizer_source="union")
    write_huggingface(found, tmp_path)
    again = read_huggingface(tmp_path)
    assert again.tokenizer.get_vocab() == found.tokenizer.get_vocab()
    assert again.tokenizer.encode("<|turn|>abc").ids == found.tokenizer.encode("<|turn|>abc").ids


WORDS = Tokenizer(models.WordPiece({"x": 0, "[UNK]": 1}, unk_token="[UNK]"))
SPELLED = byte_pairs(["a", "z"], [])
SPELLED.decoder = decoders.Fuse()


@pytest.mark.parametrize(
    ("a", "more", "message"),
    [
        (
            None,
            {},
            "the vocabularies differ, 5 tokens in base and 7 in a, first in '<s>': 4 and 5; tokenizer_source: un",
        ),
        (model(1, A, 6), {"tokenizer_source": "union"}, "a has 7 tokens, and model.embed_tokens.weight 6 rows"),
        (model(1, None, 6), {"tokenizer_source": "union"}, "a has no tokenizer, so that"),
        (
            model(1, WORDS, 6),
            {"tokenizer_source": "union"},
            "expected byte-pair encodings, found WordPiece in a and BPE",
        ),
        (model(1, SPELLED, 6), {"tokenizer_source": "union"}, "spelled in other ways, Fuse in a and ByteLevel"),
    ],
    ids=["none asked for", "too few rows", "no tokenizer", "another kind", "another spelling"],
)
def test_vocabularies_that_do_not_unite(a: Checkpoint | None, more: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merged(MODELS | ({"a": a} if a else {}), **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tokenizer_source": "c"}, "tokenizer_source: no model 'c'"),
        ({"tokenizer": {"tokens": {"bc": {"source": "a"}}}}, "the vocabulary has no token 'bc'"),
        ({"tokenizer": {"tokens": {"ab": {"source": "d"}}}}, "'ab': no model 'd'"),
        ({"tokenizer": {"tokens": {"<s>": {"source": "b"}}}}, "'<s>': b has no token '<s>'"),
    ],
)
def test_tokens_and_models_that_are_not_there(more: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merged(**more)


def test_an_output_layer_that_one_model_lacks() -> None:
    tied = dataclasses.replace(MODELS["a"], tensors={n: t for n, t in MODELS["a"].tensors.items() if n != NAMES[1]})
    with pytest.raises(CheckpointError, match=r"a has no tensor 'lm_head.weight', which base has"):
        merged(MODELS | {"a": tied}, tokenizer_source="union")
