"""The Hopper kernel of quantized_dot: simulated beside its reference body, and compiled without a GPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.plans import GPUS, avals, gpu_plan, simulated_gpu
from tests.kernels.test_quantized_dot_tpu import operands
from xlathe.errors import OptionError
from xlathe.kernels.quantized_dot.gpu_sm90 import quantized_dot
from xlathe.ops.quantized_dot import quantized_dot as operation

SIMULATED = simulated_gpu(quantized_dot)


@pytest.mark.parametrize("sizes", [(1, 64, 128), (5, 192, 384), (70, 128, 1024), (140, 128, 256)])
def test_close_to_the_reference(sizes: tuple[int, int, int]) -> None:
    args = operands(*sizes)
    actual, expected = SIMULATED(*args, out_dtype="float32"), operation.body(*args, out_dtype="float32")
    assert jnp.max(jnp.abs(actual - expected)) <= 1e-6 * jnp.max(jnp.abs(expected))


def test_leading_axes_and_the_dtype_of_the_result() -> None:
    x, codes, scale = operands(6, 128, 128)
    expected = operation.body(x, codes, scale, out_dtype="bfloat16")
    actual = SIMULATED(x.reshape(2, 3, 128), codes, scale, out_dtype="bfloat16")
    assert actual.shape == (2, 3, 128) and actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual.reshape(6, 128), expected)


@pytest.mark.parametrize("sizes", [(1, 4096, 4096), (8, 11008, 4096), (512, 4096, 11008), (5, 192, 384)])
@pytest.mark.parametrize("name", GPUS)
def test_compiles(
    name: str,
    sizes: tuple[int, int, int],
    note: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    rows, n, k = sizes
    kernel = functools.partial(quantized_dot, out_dtype="bfloat16")
    plan = gpu_plan(name, capfd, kernel, *avals(f"bfloat16 {rows} {k}", f"int8 {n} {k}", f"float32 {n}"))
    assert plan.spilled == 0
    note(f"quantized_dot {name} {rows}x{k} by {n}x{k}: {plan}")


@pytest.mark.parametrize(
    ("x", "codes", "found"),
    [
        ("float32 2 128", "int8 64 128", "found float32, int8, float32"),
        ("bfloat16 2 128", "int8 96 128", r"n a multiple of 64 and k of 128; found \(96, 128\)"),
        ("bfloat16 2 192", "int8 64 192", r"n a multiple of 64 and k of 128; found \(64, 192\)"),
        ("bfloat16 2 128", "int8 64 256", r"found \(2, 128\), \(64, 256\), \(64,\)"),
    ],
)
def test_refused_operands(x: str, codes: str, found: str) -> None:
    kernel = functools.partial(quantized_dot, out_dtype="float32")
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(x, codes, f"float32 {codes.split()[1]}"))
