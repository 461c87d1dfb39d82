"""The Hopper kernel of cached_attention: simulated beside its reference body, and compiled without a GPU."""

import functools
from collections.abc import Callable

import jax
import pytest

from tests.kernels import cached_attention_cases as cases
from tests.kernels.plans import GPUS, avals, gpu_plan, simulated_gpu
from xlathe.errors import OptionError
from xlathe.kernels.cached_attention.gpu_sm90 import cached_attention

SIMULATED = simulated_gpu(cached_attention)


@pytest.mark.parametrize("name", cases.CASES)
def test_as_good_as_the_reference(name: str) -> None:
    (n, r, s, *rest), window, softcap = cases.CASES[name]
    cases.check(SIMULATED, ((n, r, -(-s // 64) * 64, *rest), window, softcap), "bfloat16")


def test_only_seen_slots_count() -> None:
    cases.check_only_seen_slots_count(SIMULATED, "bfloat16")


def test_same_bits_in_any_company() -> None:
    cases.check_same_bits_in_any_company(SIMULATED, "bfloat16")


def test_padding() -> None:
    cases.check_padding(SIMULATED, "bfloat16")


SIZES = {"decode of 8 rows": (8, 8, 4), "decode of 8 rows, 7 heads a key": (8, 2, 7), "512 new tokens": (512, 8, 4)}


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", GPUS)
def test_compiles(
    name: str,
    sizes: tuple[int, int, int],
    head: int,
    note: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    n, k, g = sizes
    q, cache, places = f"bfloat16 {n} {k} {g} {head}", f"bfloat16 8 2048 {k} {head}", f"int32 {n}"
    kernel = functools.partial(cached_attention, **cases.options("bfloat16", 512, 50.0))
    plan = gpu_plan(name, capfd, kernel, *avals(q, cache, cache, places, places))
    assert plan.spilled == 0
    note(f"cached_attention {name} {q}, cache {cache}: {plan}")


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
