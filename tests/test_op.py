"""Operations: functions that stay one equation, and carry what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from xlathe import jaxpr as ir
from xlathe.op import Op
from xlathe.ops import OPS
from xlathe.primitives import WORDS


@xl.op("shifted_square")
def shifted_square(x, y, *, shift: float, rounded: bool):
    """(x - shift)^2 + y, rounded or not."""
    result = (x - shift) ** 2 + y
    return jnp.round(result) if rounded else result


X, Y = jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.arange(6.0).reshape(2, 3)


def traced(function, *operands):
    return jax.make_jaxpr(function)(*operands)


def half(x, y):
    return shifted_square(x, y, shift=0.5, rounded=False)


def only_op(jaxpr):
    (eqn,) = [e for e in jaxpr.eqns if ir.is_op(e)]
    return eqn


def test_computes_its_body():
    expected = (np.asarray(X) - 0.5) ** 2 + np.asarray(Y)
    for function in (half, jax.jit(half)):
        assert np.allclose(function(X, Y), expected, rtol=1e-6)


def test_is_one_equation_with_attributes():
    eqn = only_op(traced(half, X, Y))
    assert eqn.primitive.name == "xlathe.shifted_square" and ir.is_op(eqn, "shifted_square")
    assert ir.attributes(eqn) == {"shift": 0.5, "rounded": False}
    assert shifted_square.recognizes(eqn)


def test_other_operations_are_not_recognized():
    eqn = only_op(traced(half, X, Y))
    same_name = Op("shifted_square", lambda x, y, *, shift, rounded: x * y, shifted_square.primitive)
    assert not same_name.recognizes(eqn)
    assert not any(op.recognizes(eqn) for op in OPS)


def test_a_transformed_body_is_not_recognized():
    """Under vmap operands change while attributes do not: only the body tells."""
    batched = only_op(traced(jax.vmap(half, in_axes=(0, None)), jnp.stack([X, X, X]), Y))
    assert ir.attributes(batched) == {"shift": 0.5, "rounded": False}
    assert not shifted_square.recognizes(batched)


def test_differentiates_through_its_body():
    gradient = jax.grad(lambda x: half(x, Y).sum())(X)
    assert np.allclose(gradient, 2 * (np.asarray(X) - 0.5), rtol=1e-6)


def test_symbolic_sizes():
    b, t = jax.export.symbolic_shape("b, t")
    aval = jax.ShapeDtypeStruct((b, t), jnp.float32)
    jaxpr = jax.make_jaxpr(half)(aval, aval)
    assert shifted_square.recognizes(only_op(jaxpr))
    assert np.allclose(ir.evaluate_at(jaxpr, [X, Y], {"b": 2, "t": 3})[0], half(X, Y))


def test_specialized_sizes_are_recognized():
    b, t = jax.export.symbolic_shape("b, t")
    aval = jax.ShapeDtypeStruct((b, t), jnp.float32)
    jaxpr = jax.make_jaxpr(half)(aval, aval)
    fixed = ir.trace(lambda x, y: ir.evaluate_at(jaxpr, [x, y], {"b": 2, "t": 3}), X, Y)
    assert shifted_square.recognizes(only_op(fixed))


def test_unknown_attribute():
    with pytest.raises(TypeError, match="shfit"):
        shifted_square(X, Y, shfit=0.5, rounded=False)


def test_names_are_unique_and_no_primitives():
    names = [op.name for op in OPS]
    assert len(set(names)) == len(names) and not set(names) & WORDS
