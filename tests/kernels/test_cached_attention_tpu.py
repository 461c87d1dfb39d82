"""The TPU kernel of cached_attention: simulated beside its reference body, and compiled without a TPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.kernels import cached_attention_cases as cases
from tests.kernels.plans import TPUS, avals, tpu_plan
from xlathe.errors import OptionError
from xlathe.kernels.cached_attention.coverage import reach
from xlathe.kernels.cached_attention.tpu import cached_attention

SIMULATED = functools.partial(
    cached_attention, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", cases.CASES)
def test_as_good_as_the_reference(name: str, dtype: str) -> None:
    cases.check(SIMULATED, cases.CASES[name], dtype)


def test_only_seen_slots_count() -> None:
    cases.check_only_seen_slots_count(SIMULATED, "float32")


def test_same_bits_in_any_company() -> None:
    cases.check_same_bits_in_any_company(SIMULATED, "float32")


def test_padding() -> None:
    cases.check_padding(SIMULATED, "float32")


def test_blocks_that_no_token_sees_are_left_out() -> None:
    """Blocks of 4 slots; tile 0 has tokens of rows 2 and 0, tile 1 padding only."""
    rows, positions = jnp.array([[2, 0, 2], [3, -1, 3]]), jnp.array([[9, 3, 13], [0, 5, 1]])
    everything, window = (reach(rows, positions, w, (3, 16), 4) for w in (None, 3))
    assert everything.row[0].tolist() == [0, 2, 2]
    assert everything.first.tolist() == [[0, 0, 4], [0, 0, 0]]
    assert everything.stop.tolist() == [[1, 4, 4], [0, 0, 0]]
    assert window.first[0].tolist() == [0, 1, 4]


SIZES = {"decode of 8 rows": (8, 8, 4), "decode of 8 rows, 7 heads a key": (8, 2, 7), "512 new tokens": (512, 8, 4)}


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", TPUS)
def test_compiles(name: str, sizes: tuple[int, int, int], head: int, note: Callable[[str], None]) -> None:
    n, k, g = sizes
    q, cache, places = f"bfloat16 {n} {k} {g} {head}", f"bfloat16 8 2048 {k} {head}", f"int32 {n}"
    kernel = functools.partial(cached_attention, **cases.options("bfloat16", 512, 50.0))
    vmem, temporary = tpu_plan(name, kernel, *avals(q, cache, cache, places, places))
    note(f"cached_attention {name} {q}, cache {cache}: {vmem:,} bytes of VMEM, {temporary:,} of temporaries")


@pytest.mark.parametrize(("changed", "options", "found"), cases.REFUSED)
def test_refused_operands(changed: dict[str, str], options: dict[str, object], found: str) -> None:
    kernel = functools.partial(cached_attention, **(cases.options("bfloat16") | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(cases.GOOD | changed).values()))
