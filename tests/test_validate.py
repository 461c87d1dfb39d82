"""A replacement is run beside what it replaces; one that is not the same is found out."""

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.rewrite import Replacement
from xlathe.validate import deviation


def traced(function, *shapes):
    (b,) = jax.export.symbolic_shape("b")
    return ir.trace(function, *(jax.ShapeDtypeStruct([b if n == "b" else n for n in s], jnp.float32) for s in shapes))


def test_the_same_and_another_function() -> None:
    jaxpr = traced(lambda x, w: jnp.tanh(x * 2.0) @ w, ("b", 3), (3, 5))
    (doubled, *_), (result,) = [e.outvars[0] for e in jaxpr.eqns], jaxpr.outvars
    x, w = jaxpr.invars
    rng = np.random.default_rng(0)
    samples = {x: rng.normal(size=(2, 3)).astype(np.float32), w: rng.normal(size=(3, 5)).astype(np.float32)}
    same = Replacement((x, w), lambda x, w: jnp.tanh(x + x) @ w)
    assert deviation(jaxpr, result, same, samples, {"b": 2}) < 1e-6
    another = Replacement((x, w), lambda x, w: jnp.tanh(x) @ w)
    assert deviation(jaxpr, result, another, samples, {"b": 2}) > 0.1
    inner = Replacement((x,), lambda x: x + x)
    assert deviation(jaxpr, doubled, inner, {x: samples[x]}, {"b": 2}) == 0.0


def test_no_number_is_an_infinite_deviation() -> None:
    jaxpr = traced(lambda x: jnp.log(x), ("b",))
    sample = {jaxpr.invars[0]: np.asarray([-1.0, 1.0], np.float32)}
    replacement = Replacement(tuple(jaxpr.invars), jnp.log)
    assert deviation(jaxpr, jaxpr.outvars[0], replacement, sample, {"b": 2}) == float("inf")


def test_what_the_replacement_does_not_read_is_random() -> None:
    """Before: x + y. A replacement that reads x alone cannot be right."""
    jaxpr = traced(lambda x, y: x + y, ("b",), ("b",))
    x, _ = jaxpr.invars
    replacement = Replacement((x,), lambda x: x)
    assert deviation(jaxpr, jaxpr.outvars[0], replacement, {x: np.ones(2, np.float32)}, {"b": 2}) > 0.1
