"""The Hopper kernels of quantized_dot: simulated beside the reference body, and compiled without a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from tests.kernels import quantized_dot_cases as cases
from tests.kernels.plans import GPUS, avals, gpu_plan, simulated_gpu
from xlathe.errors import OptionError
from xlathe.kernels.quantized_dot.gpu_sm90 import quantized_dot

SIMULATED = simulated_gpu(quantized_dot)


@pytest.mark.parametrize("sizes", [(1, 64, 128), (5, 192, 384), (70, 128, 1024), (140, 128, 256)])
def test_close_to_the_reference(sizes: tuple[int, int, int]) -> None:
    cases.check(SIMULATED, sizes)


def test_leading_axes_and_the_dtype_of_the_result() -> None:
    cases.check_leading_axes_and_the_dtype_of_the_result(SIMULATED)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(
    ("sizes", "group"), [((1, 64, 256), 32), ((5, 128, 2304), 64), ((140, 64, 512), 128), ((3, 64, 1024), 512)]
)
def test_int4_is_as_good_as_a_weight_in_bfloat16(sizes: tuple[int, int, int], group: int, zeros: bool) -> None:
    cases.check_int4(SIMULATED, sizes, group, zeros=zeros, out_dtype="float32" if zeros else "bfloat16")


def test_int4_reads_every_code() -> None:
    cases.check_int4_by_units(SIMULATED, 64, 256, 32)


SIZES = [(1, 4096, 4096), (8, 11008, 4096), (512, 4096, 11008)]


@pytest.mark.parametrize("sizes", [*SIZES, (5, 192, 384)])
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
    kernel = functools.partial(quantized_dot, out_dtype="bfloat16", **cases.INT8)
    plan = gpu_plan(name, capfd, kernel, *avals(f"bfloat16 {rows} {k}", f"int8 {n} {k}", f"float32 {n}"))
    assert plan.spilled == 0
    note(f"quantized_dot {name} {rows}x{k} by {n}x{k}: {plan}")


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("sizes", "group"), [*((sizes, 32) for sizes in SIZES), ((5, 192, 2304), 128)])
@pytest.mark.parametrize("name", GPUS)
def test_int4_compiles(
    name: str,
    sizes: tuple[int, int, int],
    group: int,
    zeros: bool,
    note: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    rows, n, k = sizes
    kernel = functools.partial(quantized_dot, out_dtype="bfloat16", format=f"int4:g{group}{',asym' * zeros}")
    zero = [f"uint8 {n} {k // group}"] * zeros
    arrays = avals(f"bfloat16 {rows} {k}", f"uint8 {n} {k // 2}", f"bfloat16 {n} {k // group}", *zero)
    plan = gpu_plan(name, capfd, kernel, *arrays)
    assert plan.spilled == 0
    note(f"quantized_dot {name} {rows}x{k} by {n}x{k}, int4 in groups of {group}{', zero points' * zeros}: {plan}")


OTHER_TILES: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"codes": "int8 96 128", "scale": "float32 96"}, {}, "n a multiple of 64 and k of 128; found 96 and 128"),
    ({"x": "bfloat16 2 192", "codes": "int8 64 192"}, {}, "n a multiple of 64 and k of 128; found 64 and 192"),
    (cases.GOOD_INT4, cases.INT4, "n a multiple of 64 and k of 256; found 64 and 128"),
]


@pytest.mark.parametrize(("changed", "options", "found"), [*cases.REFUSED, *OTHER_TILES])
def test_refused_operands(changed: dict[str, str], options: dict[str, Any], found: str) -> None:
    kernel = functools.partial(quantized_dot, **({"out_dtype": "float32"} | cases.INT8 | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(cases.GOOD | changed).values()))
