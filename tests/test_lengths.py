"""Branches on a size are seen by no trace: they are found by comparing with the author's code."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import xlathe as xl
from tests.graphs import graph_of, relative
from xlathe.errors import TraceError

RNG = np.random.default_rng(0)
E = RNG.normal(size=(11, 4)).astype(np.float32)


def scaled(scale: Callable[[int, int], float]) -> Callable:
    return lambda params, ids: params["e"][ids] * scale(*ids.shape) @ params["e"].T


BRANCHES = {
    "one token": lambda b, t: 2 if t == 1 else 1,
    "even lengths": lambda b, t: 2 if t % 2 == 0 else 1,
    "one row": lambda b, t: 2 if b == 1 else 1,
    "a known length": lambda b, t: 3 if t in (5, 8) else 1,
    "lengths above nine": lambda b, t: 2 if t > 9 else 1,
    "one length": lambda b, t: 2 if t == 11 else 1,
    "one of some lengths": lambda b, t: 2 if t in (6, 12) else 1,
    "the longest length": lambda b, t: 2 if t == 16 else 1,
    "all but one length": lambda b, t: 2 if t + 1 != 12 else 1,
    "multiples of seven": lambda b, t: 2 if t % 7 == 0 else 1,
    "seven rows": lambda b, t: 2 if b == 7 else 1,
    "so many tokens": lambda b, t: 2 if b * t == 39 else 1,
    "a bounded length": lambda b, t: 0.1 * min(t, 12),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_the_sizes_is_refused(name):
    with pytest.raises(TraceError, match=r"on \d row\(s\) of \d+ token\(s\)"):
        graph_of(scaled(BRANCHES[name]), e=E)


@pytest.mark.parametrize("max_len", [1, 2, 9, 16])
def test_a_branch_that_changes_nothing_is_kept(max_len):
    def model(params, ids):
        x = params["e"][ids]
        if ids.shape[1] == 1:
            return (x[:, 0] @ params["e"].T)[:, None]
        return x @ params["e"].T

    ids = RNG.integers(0, 11, (2, 1), dtype=np.int32)
    assert relative(graph_of(model, max_len=max_len, e=E)(ids), model({"e": jnp.asarray(E)}, ids)) < 1e-5


def test_a_whole_table_is_not_sliced():
    """Expected: two programs, one for the longest length alone, that compute the same."""

    def model(params, ids):
        t = ids.shape[1]
        table = params["table"] if t == len(params["table"]) else params["table"][:t]
        return (params["e"][ids] + table) @ params["e"].T

    table = RNG.normal(size=(16, 4)).astype(np.float32)
    ids = RNG.integers(0, 11, (2, 16), dtype=np.int32)
    found = graph_of(model, e=E, table=table)(ids)
    assert relative(found, model({"e": jnp.asarray(E), "table": table}, ids)) < 1e-5


def test_one_length_too_long_to_compare():
    with pytest.raises(TraceError, match=r"another program on 2 row\(s\) of 5000 token\(s\) alone, .* too many"):
        graph_of(scaled(lambda b, t: 2 if t == 5000 else 1), max_len=5001, e=E)


def test_a_loop_over_stacked_weights_is_no_branch():
    def model(params, ids):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), params["e"][ids], params["w"])
        return x * (2 if ids.shape[1] == 1 else 1) @ params["e"].T

    with pytest.raises(TraceError, match=r"1 row\(s\) of 1 token\(s\)"):
        graph_of(model, e=E, w=np.ones((3, 4, 4), np.float32))


def test_a_model_that_cannot_run_on_short_rows():
    def model(params, ids):
        assert ids.shape[1] != 2, "two is not a length"
        return params["e"][ids] @ params["e"].T

    with pytest.raises(TraceError, match=r"of 2 token\(s\): AssertionError: two is not a length"):
        graph_of(model, e=E)


def test_a_model_that_cannot_run_at_all():
    with pytest.raises(TraceError, match=r"it fails on .* ValueError"):
        xl.trace(lambda params, ids: params["e"][ids] + jnp.ones((ids.shape[1], 7)), {"e": E}, max_len=8)


def test_low_precision_may_be_summed_in_another_order():
    def model(params, ids):
        x = params["e"][ids].astype(jnp.bfloat16)
        return jax.nn.softmax(x if ids.shape[1] == 1 else x + 0) @ params["e"].T.astype(jnp.bfloat16)

    assert graph_of(model, e=E).jaxpr.outvars[0].aval.dtype == jnp.bfloat16
