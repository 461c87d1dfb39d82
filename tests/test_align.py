"""Aligned traces: numbers seen at three lengths become expressions of the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import relative
from xlathe.align import Fit
from xlathe.errors import TraceError

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
B, T = jax.export.symbolic_shape("b, t")
SIZES = ((3, 64), (5, 63), (7, 13))


EXPRESSIONS = [
    lambda b, t: 5,
    lambda b, t: t,
    lambda b, t: b,
    lambda b, t: t - 1,
    lambda b, t: 4 * t,
    lambda b, t: b * t,
    lambda b, t: 6 * b * t,
    lambda b, t: (b, t, 4),
    lambda b, t: ((b, 4 * t), (1, t + 2)),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_fit_finds_expressions(expression):
    fit = Fit(SIZES, B, T)
    assert fit(*(expression(b, t) for b, t in SIZES)) == expression(B, T)


@pytest.mark.parametrize(
    "expression", [lambda b, t: t // 2, lambda b, t: t * t, lambda b, t: f"{t}", lambda b, t: min(t, 20)]
)
def test_fit_refuses_what_it_does_not_know(expression):
    with pytest.raises(Exception, match=r"expression|became"):
        Fit(SIZES, B, T)(*(expression(b, t) for b, t in SIZES))


def attention(params, ids, mask):
    x = params["e"][ids]
    scores = x @ x.swapaxes(1, 2)
    return jax.nn.softmax(jnp.where(mask(ids.shape[1]), scores, -1e9)) @ x @ params["e"].T


MASKS = {
    "numpy tril": lambda t: np.tril(np.ones((t, t), bool)),
    "sliding window in NumPy": lambda t: np.tril(np.ones((t, t), bool)) & ~np.tril(np.ones((t, t), bool), -7),
    "a Python branch": lambda t: jnp.tril(jnp.ones((t, t), bool)) if t > 1 else jnp.ones((1, 1), bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("t", [2, 5, 40])
def test_computes_the_same_at_other_lengths(name, t):
    def model(params, ids):
        return attention(params, ids, MASKS[name])

    ids = np.random.default_rng(1).integers(0, 11, (2, t), dtype=np.int32)
    graph = xl.trace(model, {"e": E}, max_len=48)
    assert relative(graph(ids), model({"e": jnp.asarray(E)}, ids)) < 1e-5


def test_constants_are_those_of_the_longest_row():
    graph = xl.trace(lambda p, i: attention(p, i, MASKS["numpy tril"]), {"e": E}, max_len=48)
    (name,) = graph.names("const")
    assert np.array_equal(graph.weights[name], np.tril(np.ones((48, 48), bool)))


def test_tables_that_are_no_leading_slice_are_refused():
    def model(params, ids):
        return attention(params, ids, lambda t: np.tril(np.ones((t, t), bool))[::-1].copy())

    with pytest.raises(TraceError, match="leading slice"):
        xl.trace(model, {"e": E}, max_len=48)


def test_a_branch_between_the_lengths_is_refused():
    """A window of 20 only shows in rows that are longer: the short trace must run the same program."""

    def model(params, ids):
        t = int(ids.shape[1])
        x = params["e"][ids]
        return (jnp.tanh(x) if t > 20 else x) @ params["e"].T

    with pytest.raises(TraceError, match="branches on the length"):
        xl.trace(model, {"e": E}, max_len=48)


def test_too_short_to_align():
    with pytest.raises(TraceError, match="max_len=3 is too short"):
        xl.trace(lambda p, i: attention(p, i, MASKS["numpy tril"]), {"e": E}, max_len=3)


def test_a_table_of_rows_cannot_serve_any_number_of_rows():
    def model(params, ids):
        return (params["e"][ids] + params["e"][: ids.shape[0], None]) @ params["e"].T

    with pytest.raises(TraceError, match="not for every size"):
        xl.trace(model, {"e": E}, max_len=16)
