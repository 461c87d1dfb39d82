"""Elementwise operations are done before their operands are spread."""

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.narrow import narrow


def test_a_mask_keeps_two_axes_until_the_end() -> None:
    """Before: and [3, 4, 5, 6]. Expected: and [5, 6], then one broadcast."""

    def before(x: jax.Array) -> jax.Array:
        causal = jnp.arange(5)[:, None] >= jnp.arange(6)
        wide = jnp.broadcast_to(causal[None, None], (3, 4, 5, 6)) & jnp.ones((3, 4, 5, 6), bool)
        return jnp.where(wide, x, 0.0)

    jaxpr = ir.inline_calls(ir.trace(before, jax.ShapeDtypeStruct((3, 4, 5, 6), jnp.float32)), lambda eqn: True)
    after, _ = ir.drop_dead(narrow(jaxpr), keep=lambda i: True)
    assert [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "and"] == [(3, 4, 5, 6)]
    assert [e.outvars[0].aval.shape for e in after.eqns if e.primitive.name == "and"] == [(5, 6)]
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(ir.evaluate(after, [x])[0], before(x))


def test_operands_with_different_axes_are_met_on_both() -> None:
    def before(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.broadcast_to(a[:, None, None], (2, 3, 4)) * jnp.broadcast_to(b[None, :, None], (2, 3, 4))

    jaxpr = ir.trace(before, jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32))
    after = narrow(ir.inline_calls(jaxpr, lambda eqn: True))
    assert [e.outvars[0].aval.shape for e in after.eqns if e.primitive.name == "mul"] == [(2, 3)]
    a, b = np.asarray([1.0, 2.0], np.float32), np.asarray([3.0, 4.0, 5.0], np.float32)
    np.testing.assert_array_equal(ir.evaluate(after, [a, b])[0], before(a, b))
