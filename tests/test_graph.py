"""Graphs: callable at every stage; weights are made by recipes, on demand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import ZOO, graph_of, relative, tokens, traced
from tests.variants import forward
from xlathe.graph import Input, Recipe, Weights

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)


def model(p, ids):
    return jnp.tanh(p["e"][ids]) @ p["e"].T


@pytest.mark.parametrize("name", ["heads_first", "gpt2", "mask_numpy"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 12)])
def test_call(name, b, t):
    ids = tokens(ZOO[name], b, t)
    logits = traced(name)(ids)
    assert logits.shape == (b, t, ZOO[name].vocab)
    assert relative(logits, forward(ZOO[name])(ids)) < 1e-5


def test_accepts_lists_and_other_integers():
    graph = graph_of(model, e=E)
    expected = graph(np.array([[1, 2]], np.int32))
    assert np.array_equal(graph([[1, 2]]), expected)
    assert np.array_equal(graph(np.array([[1, 2]], np.uint8)), expected)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([1, 2, 3], r"\[batch, length\], got int64 \[3\]"),
        ([[]], "non-empty"),
        ([["a"]], "integer array"),
        ([[0.5]], "integer array"),
        (np.zeros((1, 17), np.int32), "17 tokens a row, .*max_len=16"),
        ([[11]], "token id 11 is outside the vocabulary of 11 tokens"),
        ([[3, -1]], "token id -1 is outside"),
    ],
)
def test_wrong_tokens(ids, reason):
    with pytest.raises(xl.RequestError, match=reason):
        graph_of(model, e=E)(ids)


def test_inputs():
    graph = graph_of(model, e=E)
    assert graph.names("weight") == ("e",) and graph.names("arg") == ("tokens",)
    assert graph.aval("e").shape == (11, 4) and graph.vocab == 11
    assert not graph.is_step and graph.has_free_length
    assert graph.bind_names({"tokens": 1, "e": 2}) == [2, 1]


def test_inputs_and_jaxpr_must_agree():
    graph = graph_of(model, e=E)
    with pytest.raises(xl.PassError, match="1 names, 2 inputs and 0 constants"):
        graph.replace(inputs=graph.inputs[:1])
    with pytest.raises(xl.PassError, match="1 constants"):
        graph.replace(jaxpr=jax.make_jaxpr(lambda x: x + E)(E), inputs=(Input("e", "weight"),))


def test_structural_hash():
    """Expected: equal for the same program, whatever the weights; another for another program or name."""
    first = graph_of(model, e=E)
    assert first.structural_hash == graph_of(model, e=2 * E).structural_hash
    others = [
        graph_of(lambda p, ids: jnp.sin(p["e"][ids]) @ p["e"].T, e=E),
        graph_of(lambda p, ids: jnp.tanh(p["f"][ids]) @ p["f"].T, f=E),
        graph_of(model, e=E[:, :3]),
        graph_of(model, e=E, max_len=17),
    ]
    assert len({first.structural_hash, *(graph.structural_hash for graph in others)}) == 5


@dataclasses.dataclass(frozen=True)
class Split:
    """A recipe that counts how often it runs."""

    runs: list

    def __call__(self, array):
        self.runs.append(array.shape)
        return array[:1], array[1:]


def recipes():
    runs = []
    stored = {"w": np.arange(6.0).reshape(3, 2), "v": np.ones(2)}
    first = Recipe("w", ("w.head", "w.tail"), Split(runs))
    second = Recipe("w.tail", ("w.tail.a", "w.tail.b"), Split(runs))
    return Weights(stored).derive(first).derive(second), runs


def test_recipes_replace_their_source():
    weights, _ = recipes()
    assert set(weights) == {"v", "w.head", "w.tail.a", "w.tail.b"} and len(weights) == 4
    assert weights["w.tail.b"].tolist() == [[4, 5]] and weights["w.head"].tolist() == [[0, 1]]
    assert weights["v"].tolist() == [1, 1]


def test_recipes_run_on_demand_and_once_a_preparation():
    weights, runs = recipes()
    assert not runs
    made = weights.prepare(["w.tail.a", "v", "w.head", "w.tail.b"])
    assert list(made) == ["w.tail.a", "v", "w.head", "w.tail.b"]
    assert made["w.tail.a"].tolist() == [[2, 3]] and runs.count((2, 2)) == 1


def test_unknown_weight():
    with pytest.raises(KeyError):
        recipes()[0]["nothing"]


def test_other_values_for_some_weights_leave_the_others_unread():
    unread = jax.ShapeDtypeStruct((4, 11), jnp.float32)
    graph = graph_of(lambda p, ids: p["e"][ids] @ p["head"], e=E, head=E.T)
    graph = graph.replace(weights=Weights({**graph.weights.stored, "head": unread}))
    given = graph.with_weights({"head": jnp.asarray(2 * E.T)})
    assert relative(given([[1, 2]]), 2 * (E[[1, 2]] @ E.T)[None]) < 1e-6
    with pytest.raises(xl.errors.XlatheError, match="a shape and no value"):
        graph.with_weights({"e": E})([[1, 2]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embd": E}, "'embd' is no weight of this graph"),
        ({"e": E.T}, r"e: expected an array float32\[11, 4\], found float32\[4, 11\]"),
        ({"e": E.astype(np.float16)}, r"e: expected an array float32\[11, 4\], found float16\[11, 4\]"),
        ({"e": E.astype(np.float64)}, r"found float64\[11, 4\]"),  # JAX would take it for float32
        ({"e": E.tolist()}, r"e: expected an array float32\[11, 4\], found list"),
    ],
)
def test_values_that_fit_no_weight(arrays, message):
    with pytest.raises(xl.errors.OptionError, match=message):
        graph_of(model, e=E).with_weights(arrays)
