"""The TPU kernel of attention: simulated beside its reference body, and compiled without a TPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.attention_cases import GOOD, REFUSED, check, mask_of, operands, options_of
from tests.kernels.plans import TPUS, avals, simulated_tpu, tpu_plan
from xlathe.errors import OptionError
from xlathe.kernels.attention.coverage import visible_blocks
from xlathe.kernels.attention.tpu import attention

SIMULATED = simulated_tpu(attention)
CASES = {
    "causal": ((1, 20, 20, 1, 2, 64, 64), "causal", None),
    "a window over several blocks": ((1, 600, 600, 1, 2, 64, 128), 100, 5.0),
    "any mask": ((2, 33, 140, 2, 1, 128, 64), "random", 50.0),
    "no mask and a rest of keys": ((2, 30, 530, 1, 1, 128, 128), None, None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_good_as_the_reference(case: tuple[tuple[int, ...], str | int | None, float | None], dtype: str) -> None:
    check(SIMULATED, *case, dtype)


def test_a_mask_of_each_sequence_and_one_that_hides_all() -> None:
    """Sequence 0 sees its first 3 keys, sequence 1 none: zeros."""
    args = operands(2, 16, 16, 1, 1, 64, 64, dtype="float32")
    mask = jnp.stack([jnp.arange(16) < 3, jnp.zeros(16, bool)])[:, None, None, None]
    actual = SIMULATED(*args, mask, **options_of("float32", mask))
    first = [x[:1] for x in args]
    expected = SIMULATED(first[0], first[1][:, :3], first[2][:, :3], **options_of("float32", None))
    assert jnp.max(jnp.abs(actual[:1] - expected)) <= 1e-5
    assert not actual[1].any()


def test_blocks_that_a_mask_hides_are_left_out() -> None:
    causal, window = (mask_of(kind, 8, 8)[0, 0].astype("int8") for kind in ("causal", 3))
    first, stop = visible_blocks(jnp.concatenate([causal, window, 0 * causal]), 2, 2)
    assert first.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert stop.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 0, 0]]


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in TPUS), ("tpu-v5e", "float32")])
def test_compiles(name: str, dtype: str, head: int, note: Callable[[str], None]) -> None:
    q, kv, mask = f"{dtype} 1 2048 8 4 {head}", f"{dtype} 1 2048 8 {head}", "bool 1 1 1 2048 2048"
    kernel = functools.partial(attention, **options_of(dtype, jnp.ones(1), 50.0))
    vmem, temporary = tpu_plan(name, kernel, *avals(q, kv, kv, mask))
    note(f"attention {name} {dtype}, 2048 tokens, 32 heads of {head}: {vmem:,} of VMEM, {temporary:,} of temporaries")


@pytest.mark.parametrize("name", TPUS)
def test_compiles_at_odd_sizes(name: str) -> None:
    kernel = functools.partial(attention, **options_of("bfloat16", None))
    tpu_plan(name, kernel, *avals("bfloat16 2 301 2 3 64", "bfloat16 2 77 2 64", "bfloat16 2 77 2 128"))


@pytest.mark.parametrize(("changed", "options", "found"), REFUSED)
def test_refused_operands(changed: dict[str, str], options: dict[str, object], found: str) -> None:
    kernel = functools.partial(attention, **(options_of("bfloat16", jnp.ones(1)) | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(GOOD | changed).values()))
