"""The Hopper kernel of cached_attention: simulated beside its reference body, and compiled without a GPU."""

import functools
from collections.abc import Callable

import jax
import pytest

from tests.kernels import cached_attention_cases as cases
from tests.kernels.plans import GPUS, avals, gpu_plan, simulated_gpu
from xlathe.errors import OptionError
from xlathe.kernels.cached_attention.gpu_sm90 import cached_attention
from xlathe.ops.cached_attention import cached_attention as operation

SIMULATED = simulated_gpu(cached_attention)


LAYOUTS = pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "pages"])


@pytest.mark.parametrize("name", cases.CASES)
@LAYOUTS
def test_as_good_as_the_reference(name: str, page: int | None) -> None:
    (n, r, s, *rest), window, softcap = cases.CASES[name]
    case = (n, r, s if page else -(-s // 64) * 64, *rest), window, softcap
    cases.check(cases.kept(SIMULATED, page=page), case, "bfloat16")


@pytest.mark.parametrize("page", [8, 64, 128])
def test_pages_of_other_sizes(page: int) -> None:
    cases.check(cases.kept(SIMULATED, page=page), ((6, 2, 200, 1, 2, 64, 64), None, None), "bfloat16")


@pytest.mark.parametrize("name", cases.CASES)
@LAYOUTS
def test_int8_is_as_good_as_the_reference(name: str, page: int | None) -> None:
    (n, r, s, *rest), window, softcap = cases.CASES[name]
    case = (n, r, s if page else -(-s // 64) * 64, *rest), window, softcap
    kernel, body = (cases.kept(f, page=page, quantized=True) for f in (SIMULATED, operation.body))
    cases.check(kernel, case, "bfloat16", body=body)


@LAYOUTS
def test_only_seen_slots_count(page: int | None) -> None:
    cases.check_only_seen_slots_count(cases.kept(SIMULATED, page=page), "bfloat16")


@LAYOUTS
def test_same_bits_in_any_company(page: int | None) -> None:
    cases.check_same_bits_in_any_company(cases.kept(SIMULATED, page=page), "bfloat16")


@LAYOUTS
def test_padding(page: int | None) -> None:
    cases.check_padding(cases.kept(SIMULATED, page=page), "bfloat16")


def test_a_page_that_is_missing() -> None:
    cases.check_a_page_that_is_missing(SIMULATED, "bfloat16", 16)


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("page", [None, 16, 128], ids=["contiguous", "pages of 16", "pages of 128"])
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("sizes", cases.SIZES.values(), ids=cases.SIZES)
@pytest.mark.parametrize("name", GPUS)
def test_compiles(
    name: str,
    sizes: tuple[int, int, int],
    head: int,
    page: int | None,
    quantized: bool,
    note: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    arrays, options = cases.serving(sizes, head, page, quantized)
    plan = gpu_plan(name, capfd, functools.partial(cached_attention, **options), *avals(*arrays))
    assert plan.spilled == 0
    note(f"cached_attention {name} {arrays[0]}, cache {arrays[1]}: {plan}")


REFUSED = [
    ({"keys": "bfloat16 2 65 2 64", "values": "bfloat16 2 65 2 64"}, {}, r"multiple of 64; .*\(2, 65, 2, 64\)"),
    ({"q": "bfloat16 2 2 65 64"}, {}, "at most 64 heads a key"),
    ({"q": "float32 2 2 3 64", "keys": "float32 2 64 2 64", "values": "float32 2 64 2 64"}, {}, "in bfloat16"),
]


@pytest.mark.parametrize(("changed", "options", "found"), [*cases.REFUSED, *REFUSED])
def test_refused_operands(changed: dict[str, str], options: dict[str, object], found: str) -> None:
    kernel = functools.partial(cached_attention, **(cases.options("bfloat16") | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(cases.GOOD | changed).values()))
