"""Which kernel an operation gets on which target, and why not."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.plans import avals
from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.lower import lower_operations
from xlathe.ops import attention, cached_attention, quantized_dot
from xlathe.target import TARGETS, find_target, unit_of

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
    """Eight bits go twice as fast as sixteen on all of these, four twice as fast again; fp8 on v6e no faster than bf16.
    A table with sparse rates would not say so by itself."""
    chip = find_target(name).chip
    assert chip is not None
    fp8 = 1 if name == "tpu-v6e" else 2
    for rate, times in ((chip.int8, 2), (chip.fp8, fp8), (chip.int4, 4)):
        assert not rate or 0.95 < rate / (times * chip.bf16) < 1.05
    assert chip.int8 or chip.fp8
    assert 100 < chip.bf16 / chip.bandwidth < 700


UNITS = {
    "cpu": ("float32", "int8", "float32"),
    "h100": ("bf16", "int8", "fp8"),
    "tpu-v5e": ("bf16", "int8", "int8_token"),
    "tpu-v6e": ("bf16", "int8", "fp8"),
    "tpu-7x": ("bf16", "fp8_token", "fp8"),
}
"""What multiplies weights alone, int8 and fp8 activations; or what to use instead."""


@pytest.mark.parametrize("name", UNITS)
def test_what_a_target_lacks_is_answered_by_what_to_use(name: str) -> None:
    for activations, expected in zip((None, "int8_token", "fp8_token"), UNITS[name], strict=True):
        x, codes, scale = avals("bfloat16 4 128", "int8 64 128", "float32 64")
        options = {"out_dtype": "bfloat16", "format": "int8:channel", "activations": activations}
        jaxpr = ir.trace(lambda *a, o=options: quantized_dot(*a, **o), x, codes, scale)
        if not expected.endswith("_token"):
            lower_operations(jaxpr, find_target(name))
            assert unit_of(find_target(name), activations) == expected
            continue
        with pytest.raises(OptionError, match=rf"{name} multiplies no \w+, .*; use a={expected}, or weights alone"):
            lower_operations(jaxpr, find_target(name))


def test_reference_bodies_are_what_is_left() -> None:
    function, arguments = layer(32, "float32")
    arrays = [jnp.ones(a.shape, a.dtype) for a in arguments]
    lowered, _ = lower_operations(ir.trace(function, *arguments), find_target("h100"))
    expected = function(*arrays)
    for actual, wanted in zip(ir.evaluate(lowered, arrays), expected, strict=True):
        assert jnp.array_equal(actual, wanted)
