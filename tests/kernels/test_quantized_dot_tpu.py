"""The TPU kernels of quantized_dot: simulated beside the reference body, and compiled without a TPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from tests.kernels import quantized_dot_cases as cases
from tests.kernels.plans import TPUS, avals, simulated_tpu, tpu_plan
from xlathe.errors import OptionError
from xlathe.kernels.quantized_dot.tpu import quantized_dot

SIMULATED = simulated_tpu(quantized_dot)


@pytest.mark.parametrize("sizes", [(1, 128, 128), (3, 300, 344), (17, 130, 2200), (270, 128, 256)])
def test_close_to_the_reference(sizes: tuple[int, int, int]) -> None:
    cases.check(SIMULATED, sizes)


def test_leading_axes_and_the_dtype_of_the_result() -> None:
    cases.check_leading_axes_and_the_dtype_of_the_result(SIMULATED)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(
    ("sizes", "group"), [((1, 128, 128), 32), ((3, 300, 2144), 32), ((270, 130, 256), 128), ((5, 60, 9216), 1024)]
)
def test_int4_is_as_good_as_a_weight_in_bfloat16(sizes: tuple[int, int, int], group: int, zeros: bool) -> None:
    cases.check_int4(SIMULATED, sizes, group, zeros=zeros, out_dtype="float32" if zeros else "bfloat16")


def test_int4_reads_every_code() -> None:
    cases.check_int4_by_units(SIMULATED, 40, 320, 64)


SIZES = [(1, 4096, 4096), (8, 11008, 4096), (512, 4096, 11008)]


@pytest.mark.parametrize("sizes", [*SIZES, (5, 300, 344)])
@pytest.mark.parametrize("name", TPUS)
def test_compiles(name: str, sizes: tuple[int, int, int], note: Callable[[str], None]) -> None:
    rows, n, k = sizes
    kernel = functools.partial(quantized_dot, out_dtype="bfloat16", **cases.INT8)
    vmem, temporary = tpu_plan(name, kernel, *avals(f"bfloat16 {rows} {k}", f"int8 {n} {k}", f"float32 {n}"))
    note(f"quantized_dot {name} {rows}x{k} by {n}x{k}: {vmem:,} bytes of VMEM, {temporary:,} of temporaries")


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("sizes", "group"), [*((sizes, 32) for sizes in SIZES), ((5, 300, 2304), 128)])
@pytest.mark.parametrize("name", TPUS)
def test_int4_compiles(
    name: str, sizes: tuple[int, int, int], group: int, zeros: bool, note: Callable[[str], None]
) -> None:
    rows, n, k = sizes
    kernel = functools.partial(quantized_dot, out_dtype="bfloat16", format=f"int4:g{group}{',asym' * zeros}")
    zero = [f"uint8 {n} {k // group}"] * zeros
    arrays = avals(f"bfloat16 {rows} {k}", f"uint8 {n} {k // 2}", f"bfloat16 {n} {k // group}", *zero)
    vmem, temporary = tpu_plan(name, kernel, *arrays)
    scheme = f"int4 in groups of {group}{', zero points' * zeros}"
    note(f"quantized_dot {name} {rows}x{k} by {n}x{k}, {scheme}: {vmem:,} bytes of VMEM, {temporary:,} of temporaries")


@pytest.mark.parametrize(("changed", "options", "found"), cases.REFUSED)
def test_refused_operands(changed: dict[str, str], options: dict[str, Any], found: str) -> None:
    kernel = functools.partial(quantized_dot, **({"out_dtype": "float32"} | cases.INT8 | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(cases.GOOD | changed).values()))
