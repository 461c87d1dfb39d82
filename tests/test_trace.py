"""Tracing: every authoring of the zoo becomes a graph that computes what its author's code computes."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import xlathe as xl
from tests.graphs import ZOO, relative, tokens, traced
from tests.variants import forward
from xlathe import jaxpr as ir

EMBED = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 12)])
def test_computes_the_same(name, b, t):
    ids = tokens(ZOO[name], b, t)
    assert relative(traced(name)(ids), forward(ZOO[name])(ids)) < 1e-5


@pytest.mark.parametrize("name", ["nnx_scan", "llama", "mask_numpy", "window_16"])
def test_computes_the_same_at_the_longest_length(name):
    ids = tokens(ZOO[name], 1, traced(name).max_len)
    assert relative(traced(name)(ids), forward(ZOO[name])(ids)) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_form(name):
    """Named inputs, no captured arrays, symbolic axes, no calls but those with a custom derivative."""
    graph = traced(name)
    b, t = graph.aval("tokens").shape
    assert ir.dim_vars(b) == {"b"} and ir.dim_vars(t) == {"t"}
    assert graph.names("arg") == ("tokens",) and not graph.names("state")
    assert not graph.jaxpr.constvars and len(set(graph.names("weight", "const"))) == len(graph.weights)
    assert graph.jaxpr.outvars[0].aval.shape == (b, t, ZOO[name].vocab)
    assert not {e.primitive.name for e in graph.jaxpr.eqns} & ir.INLINED


def test_names_of_a_function():
    assert {"embed", "layers/0/wq", "layers/1/down", "norm"} <= set(traced("heads_first").names("weight"))


@pytest.mark.parametrize("name", ["nnx_scan", "linen_scan_remat", "lax_scan"])
def test_scanned_layers_are_unrolled(name):
    """Before: one stacked weight. Expected: one input a layer, numbered in its folder."""
    graph = traced(name)
    assert "scan" not in {e.primitive.name for e in graph.jaxpr.eqns}
    for weight in graph.names("weight"):
        if "/0/" in weight:
            assert weight.replace("/0/", "/1/") in graph.names("weight")
            assert np.any(graph.weights[weight] != graph.weights[weight.replace("/0/", "/1/")])
    assert any("/0/" in weight for weight in graph.names("weight"))


def test_names_of_scanned_layers():
    def model(params, ids):
        x = params["embed"][ids]
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w["up"] + w["bias"]), None), x, params["layers"])
        return x @ params["embed"].T

    rng = np.random.default_rng(1)
    up, bias = rng.normal(size=(3, 4, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    graph = xl.trace(model, {"embed": EMBED, "layers": {"up": up, "bias": bias}}, max_len=8)
    expected = {"embed", *(f"layers/{i}/{leaf}" for i in range(3) for leaf in ("up", "bias"))}
    assert set(graph.names("weight")) == expected
    assert np.array_equal(graph.weights["layers/2/up"], up[2])


def test_nnx_names_and_kinds():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 4, rngs=rngs)
            self.bias = nnx.BatchStat(jnp.arange(11.0))

        def __call__(self, ids):
            return self.embed.attend(self.embed(ids)) + self.bias[...]

    graph = xl.trace(Model(nnx.Rngs(0)), max_len=8)
    assert graph.names("weight") == ("embed/embedding",) and graph.names("const") == ("bias",)


class Remembers(nnx.Module):
    """A model that may leave something behind."""

    def __init__(self, how):
        self.how, rngs = how, nnx.Rngs(0)
        self.embed, self.norm = nnx.Embed(11, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.count, self.cache = nnx.Variable(jnp.zeros(())), nnx.Cache(jnp.zeros(4))

    def __call__(self, ids):
        x = self.embed(ids)
        if self.how == "count":
            self.count[...] += 1
        elif self.how == "norm/mean":
            x = self.norm(x)
        elif self.how == "cache":
            x, self.cache[...] = x + self.cache[...], x[0, -1]
        elif self.how == "extra":
            self.extra = nnx.Variable(x)
        return self.embed.attend(x)


@pytest.mark.parametrize("how", ["count", "norm/mean", "cache", "extra"])
def test_a_forward_that_writes_a_variable_is_refused(how):
    with pytest.raises(xl.TraceError, match=f"the model writes '{how}' in its forward"):
        xl.trace(Remembers(how), max_len=8)
    assert xl.trace(Remembers("nothing"), max_len=8).names("weight") == ("embed/embedding",)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\ud800", ""])
def test_names_that_cannot_be_printed(name):
    with pytest.raises(xl.TraceError, match="expected a name of printable characters"):
        xl.trace(lambda params, ids: params[name][ids] @ params[name].T, {name: EMBED}, max_len=8)


def test_linen_names():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids):
            return linen.Dense(11, name="head")(linen.Embed(11, 4, name="embed")(ids))

    module = Model()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    graph = xl.trace((module, variables), max_len=8)
    assert set(graph.names("weight")) == {"embed/embedding", "head/kernel", "head/bias"}


def test_a_function_of_an_nnx_module():
    """Before: a module that takes more than tokens and returns more than logits. Expected: its own names and kinds."""

    class Model(nnx.Module):
        def __init__(self):
            self.embed, self.offset = nnx.Embed(11, 4, rngs=nnx.Rngs(0)), nnx.BatchStat(jnp.ones(11))

        def __call__(self, ids, positions, cache):
            return self.embed.attend(self.embed(ids)) + self.offset[...] * positions[..., None], cache

    def call(model, ids):
        return model(ids, jnp.arange(ids.shape[1])[None], None)[0]

    model, ids = Model(), np.array([[1, 2, 3]], np.int32)
    for graph in (
        xl.trace(call, model, max_len=8),
        xl.trace(lambda state, ids: call(nnx.merge(nnx.graphdef(model), state), ids), nnx.state(model), max_len=8),
    ):
        assert graph.names("weight") == ("embed/embedding",) and graph.names("const") == ("offset",)
        assert relative(graph(ids), call(model, ids)) < 1e-6


def test_partitioned_weights_keep_their_names():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
            x = linen.Dropout(0.5)(linen.Embed(11, 4, name="embed")(ids), deterministic=True)
            return linen.Dense(11, kernel_init=init, use_bias=False, name="head")(x)

    module = Model()
    graph = xl.trace((module, module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))), max_len=8)
    assert set(graph.names("weight")) == {"embed/embedding", "head/kernel"}


def test_a_branch_that_is_decided_is_taken():
    def model(params, ids):
        x = lax.cond(ids.shape[1] <= ids.shape[1], lambda x: x, jnp.flip, params["embed"][ids])
        return lax.cond(ids.shape[1] < 1, jnp.flip, jnp.tanh, x) @ params["embed"].T

    graph = xl.trace(model, {"embed": EMBED}, max_len=8)
    assert "cond" not in {e.primitive.name for e in graph.jaxpr.eqns}
    assert relative(graph([[1, 2, 3]]), np.tanh(EMBED[[[1, 2, 3]]]) @ EMBED.T) < 1e-6


def test_captured_arrays_become_constants():
    table = np.linspace(0, 1, 8 * 11, dtype=np.float32).reshape(8, 11)

    def model(params, ids):
        return params["embed"][ids] @ params["embed"].T + table[: ids.shape[1]]

    graph = xl.trace(model, {"embed": EMBED}, max_len=8)
    (name,) = graph.names("const")
    assert np.array_equal(graph.weights[name], table)
    assert relative(graph([[1, 2, 3]]), model({"embed": jnp.asarray(EMBED)}, np.array([[1, 2, 3]]))) < 1e-6


def test_integer_parameters_are_constants():
    def model(params, ids):
        return params["embed"][ids[..., None] + params["offset"]].sum(2) @ params["embed"].T

    graph = xl.trace(model, {"embed": EMBED, "offset": np.zeros(2, np.int32)}, max_len=8)
    assert graph.names("const") == ("offset",)


def test_unread_weights_are_dropped():
    graph = xl.trace(
        lambda p, ids: p["embed"][ids] @ p["embed"].T, {"embed": EMBED, "spare": EMBED}, max_len=8
    )
    assert graph.names("weight") == ("embed",) and set(graph.weights) == {"embed"}


def test_source_lines_survive():
    def model(params, ids):
        x = params["embed"][ids]
        return jnp.tanh(x) @ params["embed"].T  # this line

    eqn = next(
        e for e in xl.trace(model, {"embed": EMBED}, max_len=8).jaxpr.eqns if e.primitive.name == "tanh"
    )
    first = model.__code__.co_firstlineno
    assert f"test_trace.py:{first + 2} " in ir.source_line(eqn)


def logits_of(x):
    return x @ EMBED.T


REFUSALS = {
    "branch on a value": (
        lambda p, i: logits_of(p["e"][i]) if i[0, 0] > 0 else logits_of(-p["e"][i]),
        "branches on",
    ),
    "no logits": (lambda p, i: p["e"][i].sum(-1), "logits"),
    "two results": (lambda p, i: (logits_of(p["e"][i]), i), "logits"),
    "one row for all": (lambda p, i: logits_of(p["e"][i[:1]]), "logits"),
    "random numbers": (
        lambda p, i: logits_of(p["e"][i] * jax.random.bernoulli(jax.random.key(0), 0.5, (4,))),
        "random",
    ),
    "dropout": (
        lambda p, i: nnx.Dropout(0.5, rngs=nnx.Rngs(0))(logits_of(p["e"][i])),
        "random",
    ),
    "a loop over tokens": (
        lambda p, i: logits_of(jnp.stack([p["e"][i[:, j]] for j in range(int(i.shape[1]))], 1)),
        "loops over tokens",
    ),
    "a branch on the length": (
        lambda p, i: logits_of(jnp.tanh(p["e"][i]) if i.shape[1] > 20 else p["e"][i]),
        "branches on the length",
    ),
    "a number that depends on the length": (
        lambda p, i: logits_of(p["e"][i] * np.float32(np.log(int(i.shape[1])))),
        "changes with the length",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name):
    function, reason = REFUSALS[name]
    with pytest.raises(xl.TraceError, match=reason):
        xl.trace(function, {"e": EMBED}, max_len=64)


def test_refusal_names_the_line():
    def model(params, ids):
        x = params["e"][ids]
        return logits_of(x * np.float32(np.log(int(ids.shape[1]))))  # this line

    with pytest.raises(xl.TraceError, match=f"test_trace.py:{model.__code__.co_firstlineno + 2} "):
        xl.trace(model, {"e": EMBED}, max_len=64)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((linen.Dense(4),), "with its variables"),
        ((logits_of,), "with its parameters"),
        ((3,), "expected an nnx.Module"),
    ],
)
def test_wrong_kind_of_model(arguments, reason):
    with pytest.raises(xl.TraceError, match=reason):
        xl.trace(*arguments, max_len=8)


@pytest.mark.parametrize("leaf", ["relu", "float32", np.float32, np.array(["relu"]), object()])
def test_a_weight_that_is_no_array_is_named(leaf):
    weights = {"embed": EMBED, "layers": {"activation": leaf}}
    found = f"weight 'layers/activation' is of type {type(leaf).__name__}, expected an array"
    with pytest.raises(xl.TraceError, match=found):
        xl.trace(lambda p, i: logits_of(p["embed"][i]), weights, max_len=8)


def test_names_that_slices_of_stacked_weights_would_take():
    """Before: `w` of two layers and a weight in a folder called 0. Expected: an error, as slice 0 is `0/w`."""

    def model(params, ids):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), params["embed"][ids], params["w"])
        return x @ params["0"]["w"] @ params["embed"].T

    weights = {"embed": EMBED, "0": {"w": np.eye(4, dtype=np.float32)}, "w": np.ones((2, 4, 4), np.float32)}
    with pytest.raises(xl.TraceError, match="would be called '0/w'"):
        xl.trace(model, weights, max_len=8)


def test_names_that_are_taken():
    table = np.ones(11, np.float32)
    cases = {
        "tokens": lambda p, ids: p["embed"][ids] @ p["tokens"],
        "const/0": lambda p, ids: p["embed"][ids] @ p["const/0"] + table,
    }
    for name, model in cases.items():
        with pytest.raises(xl.TraceError, match=f"would be called '{name}'"):
            xl.trace(model, {"embed": EMBED, name: EMBED.T}, max_len=8)


def test_max_len_must_be_positive():
    with pytest.raises(xl.TraceError, match="max_len"):
        xl.trace(logits_of, {"e": EMBED}, max_len=0)


def test_flax_is_not_needed_to_import():
    """What is loaded from disk must run where Flax is not installed."""
    import subprocess
    import sys

    code = "import sys; sys.modules['flax'] = None; import xlathe; print(xlathe.load_graph.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "load_graph", done.stderr
    assert flax.__version__
