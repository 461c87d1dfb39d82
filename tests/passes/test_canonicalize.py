"""Canonicalize: Before / Expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.graphs import ZOO, graph_of, relative, tokens, traced
from xlathe import jaxpr as ir
from xlathe.passes import Canonicalize
from xlathe.passes.canonicalize import is_elementwise_region

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
IDS = np.array([[1, 2, 3]], np.int32)


def names(graph):
    return [eqn.primitive.name for eqn in graph.jaxpr.eqns]


def test_equal_equations_are_computed_once():
    """Before: tanh(x) twice. Expected: once."""
    before = graph_of(lambda p, i: (jnp.tanh(p["e"][i]) * jnp.tanh(p["e"][i])) @ p["e"].T, e=E)
    after = Canonicalize()(before)
    assert names(before).count("tanh") == 2 and names(after).count("tanh") == 1
    assert names(after).count("gather") == 1
    assert relative(after(IDS), before(IDS)) < 1e-6


def test_equations_that_differ_stay():
    """Expected: another parameter, another operand, another literal or another dtype is another equation."""

    def model(p, i):
        x = p["e"][i]
        y = x * 2.0 + x * 3.0 + jnp.sum(x, -1, keepdims=True) + jnp.sum(x, 1, keepdims=True)
        return (y + x.astype(jnp.bfloat16).astype(jnp.float32) + x.astype(jnp.float16).astype(jnp.float32)) @ p["e"].T

    before = graph_of(model, e=E)
    after = Canonicalize()(before)
    assert names(after).count("mul") == 2 and names(after).count("reduce_sum") == 2
    assert names(after).count("convert_element_type") == names(before).count("convert_element_type")
    assert np.array_equal(after(IDS), before(IDS))


def test_literals_of_two_dtypes_are_not_merged():
    def model(p, i):
        return (p["e"][i] + (i * 2)[..., None] + (i.astype(jnp.float32) * 2.0)[..., None]) @ p["e"].T

    before = graph_of(model, e=E)
    assert np.array_equal(Canonicalize()(before)(IDS), before(IDS))


def test_dead_equations_and_inputs_are_removed():
    """Before: a weight that only a dead product reads. Expected: neither."""

    def model(p, i):
        _ = p["e"] @ p["spare"]
        return jax.jit(lambda x, y: x)(p["e"][i], jnp.sin(p["spare"])) @ p["e"].T

    before = graph_of(model, e=E, spare=np.ones((4, 4), np.float32))
    after = Canonicalize()(before)
    assert after.names("weight") == ("e",) and "sin" not in names(after)


def test_calls_are_inlined():
    """Expected: `jit` and `remat` go, also inside one another."""

    def model(p, i):
        return jax.checkpoint(jax.jit(lambda x: jax.jit(jnp.tanh)(x)))(p["e"][i]) @ p["e"].T

    assert not set(names(Canonicalize()(graph_of(model, e=E)))) & ir.INLINED


def test_elementwise_regions_keep_their_derivative():
    """Expected: relu, which keeps axes, stays a region; logsumexp, which reduces them, is inlined."""

    @jax.custom_jvp
    def norm(x):
        return jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))

    norm.defjvp(lambda primals, tangents: (norm(*primals), norm(*tangents)))

    def model(p, i):
        x = p["e"][i]
        return (jax.nn.relu(x) / norm(x)) @ p["e"].T

    after = Canonicalize()(graph_of(model, e=E))
    (region,) = [eqn for eqn in after.jaxpr.eqns if eqn.primitive.name == "custom_jvp_call"]
    assert is_elementwise_region(region) and "sqrt" in names(after)
    assert relative(after(IDS), model({"e": jnp.asarray(E)}, IDS)) < 1e-6


def test_arguments_stay_though_nobody_reads_them():
    after = Canonicalize()(graph_of(lambda p, i: jnp.zeros((*i.shape, 11)) + p["e"][:, 0], e=E))
    assert after.names("arg") == ("tokens",)


def test_a_second_time_changes_nothing():
    once = Canonicalize()(traced("llama"))
    assert Canonicalize()(once).structural_hash == once.structural_hash


def test_record():
    before = graph_of(lambda p, i: (jnp.tanh(p["e"][i]) * jnp.tanh(p["e"][i])) @ p["e"].T, e=E)
    (record,) = Canonicalize()(before).history
    assert record.name == "canonicalize" and record.hits["merged"] > 0 and record.seconds > 0
    assert record.equations == (len(before.jaxpr.eqns), len(before.jaxpr.eqns) - record.hits["merged"])


@pytest.mark.parametrize("name", ["gpt2", "rope_half", "bfloat16_float32_softmax", "mask_numpy", "experts_top_two"])
def test_values_are_kept(name):
    before = traced(name)
    ids = tokens(ZOO[name], 2, 9)
    assert relative(Canonicalize()(before)(ids), before(ids)) < ZOO[name].rtol
