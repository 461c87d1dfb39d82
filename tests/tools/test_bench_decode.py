"""The benchmark of decoding, on a model that is quick to compile."""

import dataclasses

import numpy as np
import pytest

from xlathe.kernels import native
from xlathe.models.llama import LlamaConfig
from xlathe.report import count_parameters
from xlathe.tools.bench_decode import LLAMA_1B, Outcome, Sizes, outcomes, shape_of, speculation_table, speed_table

SMALL = LlamaConfig(vocab=256, width=64, layers=1, query_heads=4, key_value_heads=2, head_dim=16, hidden=128)
SIZES = Sizes(prompt=8, new=20, rounds=1, acceptances=(0.0, 0.7, 1.0))


@pytest.fixture(scope="module")
def found() -> list[Outcome]:
    return list(outcomes(SMALL, ("float32", "int4"), SIZES))


def test_drafts_stand_as_often_as_they_are_told_to(found: list[Outcome]) -> None:
    """Of 20 tokens the first round may give 5: the oracle that is always right needs 4 rounds."""
    for each in found:
        never, often, always = each.drafted
        assert (never.tokens_per_step, always.tokens_per_step) == (1, 5)
        assert 1 < often.tokens_per_step < 5


@pytest.mark.skipif(native.library() is None, reason="reference bodies sum in an order that depends on the rows")
def test_drafts_change_no_token(found: list[Outcome]) -> None:
    assert [way.different for way in found[1].drafted] == [0, 0, 0]


def test_weights_are_counted_as_they_are_stored(found: list[Outcome]) -> None:
    """Kernels of 64 x (64 + 32 + 32 + 64) and 3 of 64 x 128, an embedding, three norms."""
    matrices, norms = 64 * 192 + 3 * 64 * 128 + 256 * 64, 3 * 64
    assert [each.weights for each in found] == [4 * (matrices + norms), matrices * 4.5 / 8 + 4 * norms]


def test_tables_tell_every_speed(found: list[Outcome]) -> None:
    assert speed_table(found).row_count == 2
    assert speculation_table(found, SIZES).row_count == 6
    assert all(np.isfinite([each.plain.prefill, each.plain.decode, each.limit]).all() for each in found)


def test_the_shape_has_a_billion_parameters_and_no_memory() -> None:
    one, two = (shape_of(dataclasses.replace(LLAMA_1B, layers=n), max_len=8) for n in (1, 2))
    layer = count_parameters(two) - count_parameters(one)
    assert 1.0e9 < count_parameters(one) + (LLAMA_1B.layers - 1) * layer < 1.1e9
    assert all(one.weights[name].strides == (0,) * one.aval(name).ndim for name in one.names("weight"))
