"""Which kernel an operation gets on which target, and why not."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.plans import avals
from xlathe import jaxpr as ir
from xlathe.lower import lower_operations
from xlathe.ops import attention, cached_attention, quantized_dot
from xlathe.target import TARGETS, find_target

CHIPS = [target.name for target in TARGETS if target.chip is not None]
DTYPES = {"scores_dtype": "float32", "softmax_dtype": "float32"}


def layer(head: int, dtype: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """A function that calls each operation once, and what it takes."""
    options = DTYPES | {"probs_dtype": dtype, "out_dtype": dtype, "scale": 0.1, "softcap": None, "biased": False}

    def function(q: Any, keys: Any, codes: Any, scale: Any, rows: Any) -> tuple[Any, ...]:
        new = attention(q[None], q[None, :, :, 0], q[None, :, :, 0], **options, masked=False)
        old = cached_attention(q, keys, keys, rows, rows, **options, window=None, masked=False)
        return new, old, quantized_dot(q.reshape(q.shape[0], -1), codes, scale, out_dtype=dtype, format="int8:channel")

    cache = [f"{dtype} 4 2 2 {head}", f"{dtype} 2 64 2 {head}"]
    return function, avals(*cache, f"int8 128 {4 * head}", "float32 128", "int32 4")


@pytest.mark.parametrize("name", CHIPS)
def test_every_operation_has_a_kernel(name: str) -> None:
    function, arguments = layer(64, "bfloat16")
    lowered, chosen = lower_operations(ir.trace(function, *arguments), find_target(name))
    assert chosen.counts == {f"{op}: kernel": 1 for op in ("attention", "cached_attention", "quantized_dot")}
    assert not chosen.reasons
    assert [a.aval.shape for a in lowered.outvars] == [(1, 4, 2, 2, 64), (4, 2, 2, 64), (4, 128)]


@pytest.mark.parametrize("name", CHIPS)
def test_reasons_against_a_kernel(name: str) -> None:
    function, arguments = layer(32, "bfloat16")
    _, chosen = lower_operations(ir.trace(function, *arguments), find_target(name))
    assert chosen.counts["attention: reference"] == chosen.counts["cached_attention: reference"] == 1
    assert all("features; found 32 and 32" in reason for reason in chosen.reasons)


def test_float32_on_hopper_is_not_rounded_to_bfloat16() -> None:
    function, arguments = layer(64, "float32")
    _, chosen = lower_operations(ir.trace(function, *arguments), find_target("h100"))
    assert set(chosen.counts) == {f"{op}: reference" for op in ("attention", "cached_attention", "quantized_dot")}
    assert any("found float32[4, 256], int8[128, 256], float32[128]" in reason for reason in chosen.reasons)


@pytest.mark.parametrize("name", CHIPS)
def test_rates_are_those_of_dense_products(name: str) -> None:
    """Eight bits go twice as fast as sixteen on all of these; a table with sparse rates would not say so by itself."""
    chip = find_target(name).chip
    assert chip is not None
    assert 1.9 < chip.int8 / chip.bf16 < 2.1
    assert 100 < chip.bf16 / chip.bandwidth < 700


def test_reference_bodies_are_what_is_left() -> None:
    function, arguments = layer(32, "float32")
    arrays = [jnp.ones(a.shape, a.dtype) for a in arguments]
    lowered, _ = lower_operations(ir.trace(function, *arguments), find_target("h100"))
    expected = function(*arrays)
    for actual, wanted in zip(ir.evaluate(lowered, arrays), expected, strict=True):
        assert jnp.array_equal(actual, wanted)
