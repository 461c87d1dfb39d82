"""Groups of rows by their experts: beside the body, on every instruction set; of others nothing is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.passes.decoding import difference, fused
from tests.passes.test_experts import operands
from tests.variants import DECODERS
from xlathe.aot import fix_step
from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot.cpu_ragged import TARGETS, quantized_ragged_dot
from xlathe.ops.quantized_ragged_dot import quantized_ragged_dot as operation
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.quantize import Quantize
from xlathe.step import empty_state, run_step

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not built")
ISAS = native.available_isas() if native.library() else ()
FORMS = ["int8:channel", "int4:g32"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[3, 0, 1, 9], [0, 0, 1], [0, 0], [17]], ids=str)
def test_equals_the_body(sizes: list[int], form: str, isa: str) -> None:
    args = operands(sizes, form)
    found = quantized_ragged_dot(*args, out_dtype="float32", isa=isa, format=form)
    expected = operation.body(*args, out_dtype="float32", format=form)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(expected).max())))
    assert not np.asarray(found)[sum(sizes) :].any()


def test_zero_points() -> None:
    x, sizes, codes, scale = operands([3, 0, 1, 9], "int4:g32")
    zero = jnp.asarray(np.random.default_rng(1).integers(0, 16, scale.shape), jnp.uint8)
    found = quantized_ragged_dot(x, sizes, codes, scale, zero, out_dtype="float32", format="int4:g32,asym")
    expected = operation.body(x, sizes, codes, scale, zero, out_dtype="float32", format="int4:g32,asym")
    assert jnp.abs(found - expected).max() <= 1e-5 * jnp.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_what_an_unchosen_expert_holds_never_leaks(form: str) -> None:
    x, counts, codes, scale = operands([3, 0, 1, 9], form)
    poisoned = scale.at[1].set(jnp.nan)
    clean, found = (
        quantized_ragged_dot(x, counts, codes, s, out_dtype="float32", format=form) for s in (scale, poisoned)
    )
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("sizes", [[3, -1, 1, 9], [3, 0, 1, 90]], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes: list[int]) -> None:
    x, _, codes, scale = operands([3, 0, 1, 9], "int8:channel")
    counts = jnp.asarray(sizes, jnp.int32)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="sum to at most M"):
        quantized_ragged_dot(x, counts, codes, scale, out_dtype="float32", format="int8:channel").block_until_ready()


def test_refused_operands() -> None:
    x, sizes, codes, scale = operands([3, 0, 1, 9], "int8:channel")
    with pytest.raises(OptionError, match=r"expected .*int8\[4, 50, 96\].* found .*int8\[4, 50, 95\]"):
        quantized_ragged_dot(x, sizes, codes[..., 1:], scale, out_dtype="float32", format="int8:channel")
    native.register()
    call = jax.ffi.ffi_call(TARGETS[8], jax.ShapeDtypeStruct((14, 50), jnp.float32))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"codes \[4, 50, 95\]"):
        call(x, sizes, codes[..., 1:], scale, isa="auto")


@pytest.mark.parametrize("options", [{}, {"scheme": "int4", "group": 32}], ids=str)
def test_a_step_is_lowered_to_it(options: dict) -> None:
    """Two products with experts a layer, by the kernel; the same logits as the reference bodies give."""
    (variant,) = (v for v in DECODERS if v.name == "stacked_when_used")
    step = KVCache()(Quantize(**options)(fused(variant)))
    lowered = fix_step(step, "cpu", rows=1, slots=16, tokens=4, selected=4)
    hits = lowered.history[-1].hits
    assert hits["quantized_ragged_dot: kernel"] == 4 and "quantized_ragged_dot: reference" not in hits
    args = {"tokens": [5, 9, 1, 3], "positions": [0, 1, 2, 3], "rows": [0] * 4, "select": [0, 1, 2, 3]}
    args = {name: np.asarray(values, np.int32) for name, values in args.items()}
    found, expected = (run_step(graph, args, empty_state(step, 1, 16))[0] for graph in (lowered, step))
    assert difference(found, expected) <= 1e-5
