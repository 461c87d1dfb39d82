"""The Hopper kernel of attention: simulated beside its reference body, and compiled without a GPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.attention_cases import GOOD, REFUSED, check, operands, options_of
from tests.kernels.plans import GPUS, avals, gpu_plan, simulated_gpu
from xlathe.errors import OptionError
from xlathe.kernels.attention.gpu_sm90 import attention

SIMULATED = simulated_gpu(attention)
CASES = {
    "causal": ((1, 20, 20, 1, 2, 64, 64), "causal", None),
    "a window over several blocks": ((1, 200, 200, 1, 2, 64, 128), 100, 5.0),
    "any mask": ((2, 33, 140, 2, 1, 128, 64), "random", 50.0),
    "no mask and a rest of keys": ((2, 30, 330, 1, 1, 128, 128), None, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_good_as_the_reference(case: tuple[tuple[int, ...], str | int | None, float | None]) -> None:
    check(SIMULATED, *case, "bfloat16")


def test_a_mask_of_each_sequence_and_one_that_hides_all() -> None:
    """Sequence 0 sees its first 3 keys, sequence 1 none: zeros."""
    args = operands(2, 16, 16, 1, 1, 64, 64, dtype="bfloat16")
    mask = jnp.stack([jnp.arange(16) < 3, jnp.zeros(16, bool)])[:, None, None, None]
    actual = SIMULATED(*args, mask, **options_of("bfloat16", mask))
    first = [x[:1] for x in args]
    expected = SIMULATED(first[0], first[1][:, :3], first[2][:, :3], **options_of("bfloat16", None))
    assert jnp.max(jnp.abs(actual[:1] - expected)) <= 1e-2 * jnp.max(jnp.abs(expected))
    assert not actual[1].any()


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("masked", [True, False])
def test_compiles(
    name: str,
    head: int,
    masked: bool,
    note: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    t = 2048 if masked else 333
    q, kv, mask = f"bfloat16 1 {t} 8 4 {head}", f"bfloat16 1 {t} 8 {head}", [f"bool 1 1 1 {t} {t}"] * masked
    kernel = functools.partial(attention, **options_of("bfloat16", jnp.ones(1) if masked else None, 50.0))
    plan = gpu_plan(name, capfd, kernel, *avals(q, kv, kv, *mask))
    assert plan.spilled == 0
    note(f"attention {name}, {t} tokens, 32 heads of {head}{', masked' * masked}: {plan}")


@pytest.mark.parametrize(("changed", "options", "found"), REFUSED)
def test_refused_operands(changed: dict[str, str], options: dict[str, object], found: str) -> None:
    kernel = functools.partial(attention, **(options_of("bfloat16", jnp.ones(1)) | options))
    with pytest.raises(OptionError, match=found):
        jax.eval_shape(kernel, *avals(*(GOOD | changed).values()))
