"""Axis labels through views, against what NumPy does to arrays of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from xlathe.axes import Axes, Einsum, NoLabels


def only(function, *shapes):
    (eqn,) = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).eqns
    return eqn


VIEWS = {
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), (2, 3, 5)),
    "merge": (lambda x: lax.reshape(x, (2, 15)), (2, 3, 5)),
    "split": (lambda x: lax.reshape(x, (2, 3, 5)), (2, 15)),
    "merge and split": (lambda x: lax.reshape(x, (2, 3, 10)), (2, 3, 2, 5)),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), (2, 1, 5)),
    "expand": (lambda x: lax.broadcast_in_dim(x, (2, 1, 5), (0, 2)), (2, 5)),
    "expand by a reshape": (lambda x: lax.reshape(x, (1, 2, 1, 5)), (2, 5)),
    "cast": (lambda x: lax.convert_element_type(x, jnp.bfloat16), (2, 5)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_forward_and_backward_agree(name):
    """Expected: the labels of the result, followed backward, are those of the operand."""
    function, shape = VIEWS[name]
    eqn, axes = only(function, shape), Axes()
    operand = axes.fresh_all(shape)
    result = axes.forward(eqn, operand)
    assert [axes.size(label) for label in result] == list(eqn.outvars[0].aval.shape)
    back = axes.backward(eqn, result)
    assert [axes.resolve(label) for label in back] == [axes.resolve(label) for label in operand]


def test_transpose_moves_labels():
    axes = Axes()
    a, b, c = axes.fresh_all((2, 3, 5))
    assert axes.forward(only(lambda x: lax.transpose(x, (2, 0, 1)), (2, 3, 5)), (a, b, c)) == (c, a, b)
    assert axes.backward(only(lambda x: lax.transpose(x, (2, 0, 1)), (2, 3, 5)), (c, a, b)) == (a, b, c)


def test_merged_axes_concatenate_labels():
    axes = Axes()
    a, b, c = axes.fresh_all((2, 3, 5))
    assert axes.forward(only(lambda x: lax.reshape(x, (2, 15)), (2, 3, 5)), (a, b, c)) == (a, (*b, *c))


def test_two_routes_to_the_same_axes_compare_equal():
    """[t, heads * d] split into heads equals [t, heads, d] whichever way it came."""
    axes = Axes()
    t, merged = axes.fresh_all((7, 12))
    split = axes.forward(only(lambda x: lax.reshape(x, (7, 4, 3)), (7, 12)), (t, merged))
    turned = axes.forward(only(lambda x: lax.transpose(x, (1, 0, 2)), (7, 4, 3)), split)
    again = axes.forward(only(lambda x: lax.transpose(x, (1, 0, 2)), (4, 7, 3)), turned)
    flat = axes.forward(only(lambda x: lax.reshape(x, (7, 12)), (7, 4, 3)), again)
    assert flat[1] == axes.resolve(merged) and flat[0] == t


def test_an_axis_of_one_has_no_label():
    assert Axes().fresh_all((1, 3, 1)) == ((), (0,), ())


def test_splits_that_cross_axes_are_refused():
    axes = Axes()
    with pytest.raises(NoLabels, match="split 2 by 3"):
        axes.forward(only(lambda x: lax.reshape(x, (3, 2)), (2, 3)), axes.fresh_all((2, 3)))


def test_repeats_are_no_forward_view():
    axes = Axes()
    eqn = only(lambda x: lax.broadcast_in_dim(x, (4, 5), (1,)), (5,))
    assert axes.forward(eqn, axes.fresh_all((5,))) is None
    repeated, kept = axes.fresh_all((4, 5))
    assert axes.backward(eqn, (repeated, kept)) == (kept,)


def test_other_operations_are_no_views():
    axes = Axes()
    labels = axes.fresh_all((2, 3))
    assert axes.forward(only(lambda x: lax.rev(x, (0,)), (2, 3)), labels) is None
    assert axes.backward(only(jnp.sin, (2, 3)), labels) is None


def test_symbolic_axes_split_and_merge():
    b, t = jax.export.symbolic_shape("b, t")
    axes = Axes()
    labels = axes.fresh_all((b, t, 12))
    split = axes.forward(only(lambda x: lax.reshape(x, (b * t, 4, 3)), (b, t, 12)), labels)
    assert split[0] == (*labels[0], *labels[1]) and len(split) == 3
    assert axes.size(split[0]) == b * t


@pytest.mark.parametrize(
    ("subscripts", "lhs", "rhs"),
    [
        ("btd,df->btf", (2, 3, 5), (5, 4)),
        ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
        ("i,i->", (3,), (3,)),
    ],
)
def test_einsum_labels_are_numpys(subscripts, lhs, rhs):
    """Expected: an einsum over the labels that were read gives what `dot_general` gives."""
    jaxpr = jax.make_jaxpr(lambda x, y: jnp.einsum(subscripts, x, y))(jnp.ones(lhs), jnp.ones(rhs))
    eqn = next(e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    axes = Axes()
    result = axes.fresh_all([size + 1 for size in eqn.outvars[0].aval.shape])  # no axis of one
    left, right = Einsum.of(eqn).operand_labels(axes, eqn, result)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=v.aval.shape).astype(np.float32) for v in eqn.invars)
    found = np.einsum(x, [a for (a,) in left], y, [a for (a,) in right], [a for (a,) in result])
    expected = eqn.primitive.bind(x, y, **eqn.params)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)
