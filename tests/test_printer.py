"""Printed graphs: stable text that is runnable Python, and reads back as the same program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import xlathe as xl
from tests.graphs import ZOO, eager, graph_of, tokens, traced
from tests.passes.decoding import fused
from xlathe import jaxpr as ir
from xlathe.parser import parse
from xlathe.printer import diff, dim_text, to_text

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)


def again(graph):
    jaxpr, inputs = parse(to_text(graph))
    return graph.replace(jaxpr=jaxpr, inputs=inputs)


def plain(jaxpr):
    """A jaxpr as JAX prints it, whatever kind of integer its parameters hold."""
    return re.sub(r"\s", "", re.sub(r"np\.int64\((-?\d+)\)", r"\1", str(jaxpr)))


def lines(graph):
    """The equations, without their types."""
    body = to_text(graph).partition("):\n")[2].splitlines()
    return [line.partition("  #")[0].strip() for line in body]


@pytest.mark.parametrize("name", ZOO)
def test_round_trip(name):
    """Expected: the same text, and equation by equation the same program."""
    graph = traced(name)
    read = again(graph)
    assert to_text(read) == to_text(graph) and read.inputs == graph.inputs
    inlined = ir.inline_calls(graph.jaxpr, lambda eqn: eqn.primitive.name in ir.CUSTOM_DERIVATIVE)
    assert plain(read.jaxpr) == plain(inlined)


@pytest.mark.parametrize("name", ["gemma2", "bfloat16_float32_softmax", "rope_complex", "recurrence", "fourier"])
def test_round_trip_keeps_every_bit(name):
    graph, ids = traced(name), tokens(ZOO[name], 2, 9)
    assert np.array_equal(eager(again(graph), ids), eager(graph, ids))


@pytest.mark.parametrize("name", ["multi_query", "alibi_keys", "soft_cap"])
def test_operations_are_printed_by_name(name):
    """Expected: `xlathe.attention` is one line with its attributes, and is made anew from them."""
    graph = fused(ZOO[name])
    assert to_text(again(graph)) == to_text(graph)
    (first, _) = [line for line in lines(graph) if " = attention(" in line]
    assert "scale=" in first and "softcap=" in first
    assert "from xlathe.ops import attention" in to_text(graph)
    calls = [eqn for eqn in again(graph).jaxpr.eqns if ir.is_op(eqn)]
    assert len(calls) == 2 and all("call_jaxpr" in eqn.params for eqn in calls)


def test_text_does_not_depend_on_the_tracing():
    def model(params, ids):
        return jnp.tanh(params["e"][ids]) @ params["e"].T

    assert to_text(graph_of(model, e=E)) == to_text(graph_of(model, e=E + 1))


def test_text():
    """Before: x * 0.5 + tanh(x) @ w. Expected: one line an equation, in the words of JAX's primitives."""

    def model(p, ids):
        x = lax.broadcast_in_dim(ids, (*ids.shape, 4), (0, 1)).astype(jnp.float32)
        return (x * 0.5 + jnp.tanh(x)) @ p["out/w"]

    graph = graph_of(model, **{"out/w": np.ones((4, 3), np.float32)})
    assert lines(graph) == [
        "b = size(tokens, axis=0)",
        "t = size(tokens, axis=1)",
        "x1 = broadcast_in_dim(tokens, shape=(b, t, 4), broadcast_dimensions=(0, 1))",
        "x2 = convert_element_type(x1, new_dtype=float32)",
        "x3 = mul(x2, float32(0.5))",
        "x4 = tanh(x2)",
        "x5 = add(x3, x4)",
        "x6 = dot_general(x5, out_w, dimension_numbers=(((2,), (0,)), ((), ())), preferred_element_type=float32)",
        "return (x6,)",
    ]
    assert '    out_w: "weight out/w float32[4, 3]",' in to_text(graph)
    assert 'b, t = symbolic_shape("b, t", constraints=["b >= 1", "t >= 1", "t <= 16"])' in to_text(graph)


def test_text_runs():
    """A person may run the file: the program as Python gives the graph's logits."""
    graph = fused(ZOO["rope_half"])
    ids = tokens(ZOO["rope_half"], 2, 9)
    space = {}
    exec(compile(to_text(graph), "graph.py", "exec"), space)
    values = {**graph.weights, "tokens": jnp.asarray(ids)}
    (logits,) = space["graph"](*graph.bind_names(values))
    assert np.array_equal(logits, eager(graph, ids))


def regions(p, ids):
    x = p["e"][ids]
    x = lax.cond(p["s"][0] > 0, lambda y: y + p["s"], lambda y: y * 2.0, x)
    x = lax.switch(ids[0, 0] % 3, [lambda y: y, lambda y: y * 2.0, lambda y: y @ p["w"]], x)
    _, states = lax.scan(lambda c, y: (c * 0.5 + y, c @ p["w"]), jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))
    x = lax.while_loop(lambda v: jnp.sum(v) < p["s"][1], lambda v: v + 1.5, x + states.swapaxes(0, 1))
    return x @ p["e"].T


def arithmetic(p, ids):
    x = p["e"][ids]
    x = x.at[:, 0].add(1.0).at[:, -1].mul(p["s"]).at[ids % 2].max(0.25)
    x = jax.nn.relu(x) + jnp.round(x) + lax.erfc(x) + lax.reduce_precision(x, 5, 5) + jnp.fft.fft(x).real
    x = x + (x.astype(jnp.complex64) * (1 + 2j)).imag + jnp.nan_to_num(x / 0.0, nan=0.5, posinf=1e30, neginf=-np.inf)
    x = jnp.dot(x, p["w"], precision="highest") + jnp.sort(x) + lax.cumsum(x, 2) + lax.top_k(x, 4)[0]
    x = x + x.astype(jnp.bfloat16) * jnp.bfloat16(0.1) + x.astype(jnp.int8).astype(jnp.float32) * (x > 0.1)
    return jnp.clip(x, -1e6, 1e6) @ p["e"].T


@pytest.mark.parametrize("model", [regions, arithmetic])
def test_round_trip_of_rarer_words(model):
    rng = np.random.default_rng(1)
    params = {"e": E, "s": rng.random(4, np.float32) + 0.5, "w": rng.normal(size=(4, 4)).astype(np.float32)}
    graph = graph_of(model, **params)
    ids = rng.integers(0, 11, (2, 5), dtype=np.int32)
    assert to_text(again(graph)) == to_text(graph)
    assert np.array_equal(again(graph)(ids), graph(ids), equal_nan=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(0.1), "float32(0.1)"),
        (np.float32(-np.inf), "float32(-inf)"),
        (np.float32(np.nan), "float32(nan)"),
        (np.float32(1e-45), "float32(1e-45)"),
        (np.float32(3.4028235e38), "float32(3.4028235e+38)"),
        (np.float32(-0.0), "float32(-0.0)"),
        (jnp.bfloat16(0.1), "bfloat16(0.100098)"),
        (np.float16(65504), "float16(6.55e+04)"),
    ],
)
def test_numbers_keep_every_bit(value, text):
    dtype = value.dtype

    def model(p, ids):
        y = lax.broadcast_in_dim(ids, (*ids.shape, 2), (0, 1)).astype(dtype)
        return lax.mul(y, lax.broadcast(np.asarray(value), y.shape)) + p["z"].astype(dtype)

    graph = graph_of(model, z=np.zeros(2, np.float32))
    assert any(f"broadcast_in_dim({text}," in line for line in lines(graph))
    assert plain(again(graph).jaxpr) == plain(graph.jaxpr)


def test_dimensions_are_python():
    b, t = jax.export.symbolic_shape("b, t", constraints=["t >= 4"])
    for dim, text in [
        (7, "7"),
        (t, "t"),
        (2 * b * t - 1, "2 * b * t - 1"),
        (t * t, "t ** 2"),
        (t // 2, "t // 2"),
        ((t + 1) % 3, "(t + 1) % 3"),
        (jax.core.max_dim(t, 9), "max_dim(t, 9)"),
    ]:
        assert dim_text(dim) == text
        names = {"b": 5, "t": 11, "max_dim": max}
        assert eval(text, names) == (dim._evaluate({"b": 5, "t": 11}) if ir.is_symbolic(dim) else dim)


def test_names_that_are_no_identifiers():
    """Expected: an identifier each, and the true name in the annotation."""
    odd = ["a/b", "a b", "1", "class", "x1", "add", "t", 'quo"te', "back\\slash", "é", "graph", "tokens "]
    params = dict.fromkeys(odd, E)
    graph = graph_of(lambda p, ids: sum(p.values())[ids] @ E.T, **params)
    assert set(again(graph).names("weight")) == set(odd)
    assert to_text(again(graph)) == to_text(graph)


def test_source_lines():
    def model(params, ids):
        return jnp.tanh(params["e"][ids]) @ params["e"].T

    text = to_text(graph_of(model, e=E), sources=True)
    (line,) = [line for line in text.splitlines() if " = tanh(" in line]
    assert line.endswith(f"  test_printer.py:{model.__code__.co_firstlineno + 1} ({model.__qualname__})")


def test_diff():
    before = graph_of(lambda p, ids: jnp.tanh(p["e"][ids]) @ p["e"].T, e=E)
    after = graph_of(lambda p, ids: jnp.sin(p["e"][ids]) @ p["e"].T, e=E)
    assert diff(before, before) == ""
    changes = [line[:1] for line in diff(before, after).splitlines() if "= tanh(" in line or "= sin(" in line]
    assert changes == ["-", "+"]


def test_what_has_no_words_is_refused():
    def model(params, ids):
        jax.debug.print("{}", ids.shape[0])
        return lax.linalg.cholesky(params["e"] @ params["e"].T)[ids]

    with pytest.raises(xl.GraphFileError, match=r"cholesky at .*test_printer.py:\d+ .* has no form"):
        to_text(graph_of(model, e=E))
