"""The TPU kernel of quantized_dot: simulated beside its reference body, and compiled without a TPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.plans import TPUS, avals, tpu_plan
from xlathe.errors import OptionError
from xlathe.kernels.quantized_dot.tpu import quantized_dot
from xlathe.ops.quantized_dot import quantized_dot as operation

SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def operands(rows: int, n: int, k: int, *, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, k)), jnp.bfloat16)
    codes = jnp.asarray(rng.integers(-127, 128, (n, k)), jnp.int8)
    return x, codes, jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32)


@pytest.mark.parametrize("sizes", [(1, 128, 128), (3, 300, 344), (17, 130, 2200), (270, 128, 256)])
def test_close_to_the_reference(sizes: tuple[int, int, int]) -> None:
    args = operands(*sizes)
    actual = quantized_dot(*args, out_dtype="float32", interpret=SIMULATED)
    expected = operation.body(*args, out_dtype="float32")
    assert jnp.max(jnp.abs(actual - expected)) <= 1e-6 * jnp.max(jnp.abs(expected))


def test_leading_axes_and_the_dtype_of_the_result() -> None:
    x, codes, scale = operands(6, 128, 128)
    expected = operation.body(x, codes, scale, out_dtype="bfloat16")
    actual = quantized_dot(x.reshape(2, 3, 128), codes, scale, out_dtype="bfloat16", interpret=SIMULATED)
    assert actual.shape == (2, 3, 128) and actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual.reshape(6, 128), expected)


@pytest.mark.parametrize("sizes", [(1, 4096, 4096), (8, 11008, 4096), (512, 4096, 11008), (5, 300, 344)])
@pytest.mark.parametrize("name", TPUS)
def test_compiles(name: str, sizes: tuple[int, int, int], note: Callable[[str], None]) -> None:
    rows, n, k = sizes
    kernel = functools.partial(quantized_dot, out_dtype="bfloat16")
    vmem, temporary = tpu_plan(name, kernel, *avals(f"bfloat16 {rows} {k}", f"int8 {n} {k}", f"float32 {n}"))
    note(f"quantized_dot {name} {rows}x{k} by {n}x{k}: {vmem:,} bytes of VMEM, {temporary:,} of temporaries")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"x": "float32 2 128"}, "found float32, int8, float32"),
        ({"codes": "uint8 64 128"}, "found bfloat16, uint8, float32"),
        ({"codes": "int8 64 127"}, r"found \(2, 128\), \(64, 127\), \(64,\)"),
        ({"scale": "float32 63"}, r"found \(2, 128\), \(64, 128\), \(63,\)"),
        ({"x": "bfloat16 0 128"}, "no axis to be empty"),
        ({"out_dtype": "float16"}, "found float16"),
    ],
)
def test_refused_operands(changed: dict[str, str], found: str) -> None:
    options = {"x": "bfloat16 2 128", "codes": "int8 64 128", "scale": "float32 64", "out_dtype": "float32"} | changed
    out_dtype = options.pop("out_dtype")
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(functools.partial(quantized_dot, out_dtype=out_dtype), *avals(*options.values()))
