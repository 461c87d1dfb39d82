"""Which uses of the length only shift the scores of a query."""

import jax
import jax.numpy as jnp
import pytest

from xlathe import jaxpr as ir
from xlathe.shifts import only_shifts
from xlathe.trace import symbolic_sizes


def shifts(bias) -> bool:
    """bias: maps the length t to [t] along the keys."""
    jaxpr = ir.trace(lambda ids: bias(ids.shape[1]), jax.ShapeDtypeStruct(symbolic_sizes(4096), jnp.int32))
    return only_shifts(ir.producers(jaxpr.eqns), jaxpr.outvars[0], 0)


SHIFTS = {
    "free of the length": lambda t: jnp.arange(t) ** 2,
    "integers": lambda t: jnp.arange(t) - (t - 1),
    "converted sums": lambda t: 0.5 * (jnp.arange(t) - t).astype(jnp.float32),
    "a slope": lambda t: -(t - jnp.arange(t)) / 8,
    "in another shape": lambda t: (jnp.arange(t) * 1.0)[None].T[:, 0] + t,
}
OTHERS = {
    "a factor": lambda t: jnp.arange(t) * t,
    "rounded to integers": lambda t: (0.5 * jnp.arange(t) - t).astype(jnp.int32),
    "integers divided": lambda t: jax.lax.div(jnp.arange(t) - t, jnp.full((t,), 2)),
    "narrow floats": lambda t: (jnp.arange(t) - t).astype(jnp.bfloat16),
    "sums of narrow floats": lambda t: jnp.arange(t).astype(jnp.bfloat16) - jnp.asarray(t).astype(jnp.bfloat16),
    "unsigned integers": lambda t: (jnp.arange(t, dtype=jnp.uint32) - jnp.asarray(t).astype(jnp.uint32)) * 1.0,
    "narrow integers": lambda t: jnp.arange(t).astype(jnp.int8) - jnp.asarray(t).astype(jnp.int8),
    "a comparison": lambda t: jnp.arange(t) >= t // 2,
    "a power": lambda t: jnp.exp(jnp.arange(t) - t),
    "from the end": lambda t: jnp.abs(jnp.arange(t) - t),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift(name):
    assert shifts(SHIFTS[name])


@pytest.mark.parametrize("name", OTHERS)
def test_no_shift(name):
    assert not shifts(OTHERS[name])
