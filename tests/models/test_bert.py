"""An encoder: named arguments beside the tokens, every pass but the cache. Its numbers are in tests/models/parity."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xlathe as xl
from tests.models.tiny import write_tiny
from xlathe import passes

BERT = {
    "model_type": "bert",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
TOKENS = np.arange(20).reshape(2, 10)
KNOWN = np.arange(10) < np.asarray([[10], [6]])  # the second row is padded after six tokens
ARGUMENTS: dict[str, Any] = {"attention_mask": KNOWN, "token_type_ids": TOKENS % 2}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> xl.Graph:
    return xl.from_pretrained(write_tiny(tmp_path_factory.mktemp("bert"), BERT))


@pytest.fixture(scope="module")
def fused(graph: xl.Graph) -> xl.Graph:
    return xl.Pipeline([passes.Canonicalize(), passes.FuseAttention()], expect={"attention": 2})(graph)


def test_padding_is_not_seen(graph: xl.Graph, fused: xl.Graph) -> None:
    """Before: a padded token. Expected: another in its place changes nothing where tokens are known."""
    changed = np.where(KNOWN, TOKENS, 60 - TOKENS)
    for each in (graph, fused):
        before, after = (np.asarray(each(ids, **ARGUMENTS)) for ids in (TOKENS, changed))
        np.testing.assert_array_equal(before[KNOWN], after[KNOWN])
    unmasked = np.asarray(graph(changed, **(ARGUMENTS | {"attention_mask": np.ones_like(TOKENS)})))
    assert np.abs(unmasked - after)[KNOWN].max() > 1e-3


def test_tokens_see_later_ones_and_their_types(graph: xl.Graph) -> None:
    before = np.asarray(graph(TOKENS, **ARGUMENTS))
    last = TOKENS.copy()
    last[0, -1] = 60
    assert np.abs(np.asarray(graph(last, **ARGUMENTS)) - before)[0, 0].max() > 1e-4
    types = ARGUMENTS | {"token_type_ids": 1 - ARGUMENTS["token_type_ids"]}
    assert np.abs(np.asarray(graph(TOKENS, **types)) - before).max() > 1e-2


def test_passes_apply(graph: xl.Graph, fused: xl.Graph, tmp_path: Path) -> None:
    expected = np.asarray(graph(TOKENS, **ARGUMENTS))
    np.testing.assert_allclose(fused(TOKENS, **ARGUMENTS), expected, atol=1e-5)
    small = passes.PruneStructured(heads=0.25, neurons=0.25)(fused)
    batch = {"tokens": TOKENS, **ARGUMENTS}
    calibrated = xl.Pipeline([passes.PruneStructured(neurons=0.25, score="activation"), passes.Quantize("int8")])
    quantized = calibrated(fused, calibration=[batch])
    for each in (small, quantized):
        assert each(TOKENS, **ARGUMENTS).shape == expected.shape
    quantized.save(tmp_path)
    np.testing.assert_array_equal(xl.load_graph(tmp_path)(TOKENS, **ARGUMENTS), quantized(TOKENS, **ARGUMENTS))


def test_there_is_no_incremental_step(fused: xl.Graph) -> None:
    with pytest.raises(xl.DeriveError, match="takes attention_mask, token_type_ids beside tokens"):
        passes.KVCache()(fused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "this graph takes attention_mask, token_type_ids, tokens; got tokens"),
        (ARGUMENTS | {"token_types": KNOWN}, "got attention_mask, token_type_ids, token_types, tokens"),
        (
            ARGUMENTS | {"attention_mask": KNOWN[:1]},
            r"attention_mask must be whole numbers \[2, 10\], as tokens, got bool",
        ),
        (ARGUMENTS | {"attention_mask": KNOWN / 2}, "attention_mask must be whole numbers .* got float64"),
    ],
)
def test_arguments_that_do_not_fit(graph: xl.Graph, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(xl.RequestError, match=message):
        graph(TOKENS, **arguments)


def test_ids_are_checked_against_the_vocabulary_not_the_width(graph: xl.Graph) -> None:
    assert graph(TOKENS + 40, **ARGUMENTS).shape == (2, 10, 32)
    with pytest.raises(xl.RequestError, match="token id 61 is outside the vocabulary of 61 tokens"):
        graph(TOKENS + 42, **ARGUMENTS)
