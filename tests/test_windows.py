"""Gathers at fixed places, and what they are as slices."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from xlathe import jaxpr as ir
from xlathe.windows import find_windows

X = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
TO_THE_FRONT = lax.GatherDimensionNumbers((1, 2, 3), collapsed_slice_dims=(3,), start_index_map=(3,))
FOUND: dict[str, Callable] = {
    "first": lambda x: x[..., :2],
    "rest": lambda x: x[..., 2:],
    "of an axis inside": lambda x: x[:, :, 1:3],
    "one": lambda x: x[:, :, 2],
    "even": lambda x: x[..., ::2],
    "odd": lambda x: x[..., 1::2],
    "third inside": lambda x: x[:, :, ::4],
    "numbers": lambda x: x[..., 3 * jnp.arange(2)],
    "to the front": lambda x: lax.gather(x, 3 * lax.iota(jnp.int32, 2)[:, None], TO_THE_FRONT, (*x.shape[:3], 1)),
}
OTHER: dict[str, Callable] = {
    "not all of a rest": lambda x: x[..., :4:2],
    "no steps": lambda x: jnp.take(x, np.array([0, 1, 3]), axis=-1),
    "twice": lambda x: jnp.take(x, np.array([1, 1]), axis=-1),
    "by what is computed": lambda x: jnp.take(x, jnp.argmax(x[0, 0, 0]) + jnp.arange(2), axis=-1),
    "of tokens": lambda x: x[:, 1:],
}


def traced(function: Callable) -> ir.Jaxpr:
    """With symbolic sizes, under which indices become gathers."""
    b, t = export.symbolic_shape("b, t")
    jaxpr = ir.trace(function, ir.aval_of(jnp.zeros((1,))).update(shape=(b, t, 4, 6)))
    return ir.inline_calls(jaxpr, lambda eqn: eqn.primitive.name in ir.INLINED)


@pytest.mark.parametrize("name", FOUND)
def test_a_window_is_what_was_looked_up(name: str) -> None:
    jaxpr = traced(FOUND[name])
    ((var, window),) = find_windows(jaxpr).items()
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.outvars[0] is var)
    assert eqn.primitive.name in ("gather", "slice")
    found = ir.evaluate_at(jaxpr, [X], {"b": 2, "t": 3}, lambda e, xs: [window(xs[0])] if e is eqn else None)
    np.testing.assert_array_equal(found[0], FOUND[name](X))


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_window_stays(name: str) -> None:
    assert not find_windows(traced(OTHER[name]))
