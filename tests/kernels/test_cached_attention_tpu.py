"""The TPU kernel of cached_attention: simulated beside its reference body, and compiled without a TPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from tests.kernels import cached_attention_cases as cases
from tests.kernels.plans import TPUS, avals, simulated_tpu, tpu_plan
from xlathe.errors import OptionError
from xlathe.kernels.cached_attention.coverage import reach
from xlathe.kernels.cached_attention.tpu import cached_attention
from xlathe.ops.cached_attention import cached_attention as operation

SIMULATED = simulated_tpu(cached_attention)


LAYOUTS = pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "pages"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", cases.CASES)
@LAYOUTS
def test_as_good_as_the_reference(name: str, dtype: str, page: int | None) -> None:
    cases.check(cases.kept(SIMULATED, page=page), cases.CASES[name], dtype)


@pytest.mark.parametrize("page", [10, 320])
def test_pages_of_any_size(page: int) -> None:
    cases.check(cases.kept(SIMULATED, page=page), cases.CASES["mixed rows and a window"], "float32")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in cases.CASES), ("mixed rows and a window", "float32")]
)
@LAYOUTS
def test_int8_is_as_good_as_the_reference(name: str, dtype: str, page: int | None) -> None:
    kernel, body = (cases.kept(f, page=page, quantized=True) for f in (SIMULATED, operation.body))
    cases.check(kernel, cases.CASES[name], dtype, body=body)


@LAYOUTS
def test_only_seen_slots_count(page: int | None) -> None:
    cases.check_only_seen_slots_count(cases.kept(SIMULATED, page=page), "float32")


@LAYOUTS
def test_same_bits_in_any_company(page: int | None) -> None:
    cases.check_same_bits_in_any_company(cases.kept(SIMULATED, page=page), "float32")


@LAYOUTS
def test_padding(page: int | None) -> None:
    cases.check_padding(cases.kept(SIMULATED, page=page), "float32")


def test_a_page_that_is_missing() -> None:
    cases.check_a_page_that_is_missing(SIMULATED, "float32", 16)


def test_blocks_that_no_token_sees_are_left_out() -> None:
    """Blocks of 4 slots; tile 0 has tokens of rows 2 and 0, tile 1 padding only."""
    rows, positions = jnp.array([[2, 0, 2], [3, -1, 3]]), jnp.array([[9, 3, 13], [0, 5, 1]])
    everything, window = (reach(rows, positions, w, (3, 16), 4) for w in (None, 3))
    assert everything.row[0].tolist() == [0, 2, 2]
    assert everything.first.tolist() == [[0, 0, 4], [0, 0, 0]]
    assert everything.stop.tolist() == [[1, 4, 4], [0, 0, 0]]
    assert window.first[0].tolist() == [0, 1, 4]


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("sizes", cases.SIZES.values(), ids=cases.SIZES)
@pytest.mark.parametrize("name", TPUS)
def test_compiles(name: str, sizes: tuple[int, int, int], head: int, note: Callable[[str], None]) -> None:
    compiles(name, *cases.serving(sizes, head), note)


PAGED = [((8, 8, 4), 128, 16), ((512, 8, 4), 64, 16), ((8, 2, 7), 128, 10)]


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize(("sizes", "head", "page"), [*PAGED, ((8, 8, 4), 128, None)])
@pytest.mark.parametrize("name", TPUS)
def test_other_layouts_compile(
    name: str, sizes: tuple[int, int, int], head: int, page: int | None, quantized: bool, note: Callable[[str], None]
) -> None:
    compiles(name, *cases.serving(sizes, head, page, quantized), note)


def compiles(name: str, arrays: list[str], options: dict[str, object], note: Callable[[str], None]) -> None:
    vmem, temporary = tpu_plan(name, functools.partial(cached_attention, **options), *avals(*arrays))
    note(f"cached_attention {name} {arrays[0]}, cache {arrays[1]}: {vmem:,} of VMEM, {temporary:,} of temporaries")


TOO_LARGE = [
    ({"table": "int32 1025 2"}, {"layout": "paged"}, r"at most 131072 entries.*found \(1025, 2\) and 64"),
    (
        {"keys": "bfloat16 2 1040 2 64", "values": "bfloat16 2 1040 2 64", "table": "int32 2 4"},
        {"layout": "paged"},
        r"at most 1024 slots; found \(2, 4\) and 1040",
    ),
]


@pytest.mark.parametrize(("changed", "options", "found"), [*cases.REFUSED, *TOO_LARGE])
def test_refused_operands(changed: dict[str, str], options: dict[str, object], found: str) -> None:
    kernel = functools.partial(cached_attention, **(cases.options("bfloat16") | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(cases.GOOD | changed).values()))
