"""Rotation of the residual stream: what stays, what it is good for, and what is refused with its line."""

import functools

import jax
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import eager, graph_of, relative, tokens, traced
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Weights
from xlathe.models.demo import files
from xlathe.passes import PASSES
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.quantize import AwqScales, Quantize, Rotate
from xlathe.passes.quantize.algorithms.rotation import random_rotation
from xlathe.passes.quantize.pairs import find_pairs
from xlathe.pipeline import REASSOCIATED, Pass, Pipeline

VARIANTS = {variant.name: variant for variant in DECODERS}
WIDTH, VOCAB = 16, 23


@functools.cache
def plain(name: str) -> Graph:
    return Canonicalize()(traced(name))


@pytest.mark.parametrize("name", ["llama", "tied_head", "parallel_blocks", "experts_top_two"])
def test_the_function_stays(name: str) -> None:
    graph, ids = plain(name), tokens(VARIANTS[name], 1, 5)
    found = Rotate()(graph)
    assert relative(eager(found, ids), eager(graph, ids)) <= REASSOCIATED.rtol
    assert found.history[-1].hits["norm"] == (3 if name == "parallel_blocks" else 5)


def test_weights_are_those_of_the_paper() -> None:
    """The embedding times Q; Q^T times what reads the norm, whose weight is in it; what writes times Q; float64."""
    graph = plain("llama")
    found, turn = Rotate(seed=3)(graph), random_rotation(32, 3)
    names = {name: np.asarray(graph.weights[name], np.float64) for name in graph.names("weight")}
    (embed,) = [name for name in names if "embed" in name]
    norm, head = "norm/scale", "lm_head/kernel"
    query, output = "layers/0/attention/q_proj/kernel", "layers/0/attention/o_proj/kernel"
    expected = {
        embed: names[embed] @ turn,
        query: turn.T @ (names["layers/0/input_norm/scale"][:, None] * names[query]),
        output: names[output] @ turn,
        head: turn.T @ (names[norm][:, None] * names[head]),
        norm: np.ones(32),
    }
    for name, weight in expected.items():
        np.testing.assert_array_equal(np.asarray(found.weights[name]), weight.astype(np.float32), err_msg=name)
    assert found.structural_hash == graph.structural_hash


def test_a_tied_embedding_gets_a_head_where_the_norm_has_a_weight() -> None:
    model, _ = files.load("draft")
    graph = xl.trace(model, max_len=32)
    found, ids = Rotate()(graph), np.arange(12, dtype=np.int32)[None]
    assert relative(found(ids), graph(ids)) <= REASSOCIATED.rtol
    (added,) = set(found.names("weight")) - set(graph.names("weight"))
    name = added.removesuffix(".head")
    assert found.history[-1].notes == (f"{name} is the output layer no more: {added} is",)
    assert found.weights.trained(added) == (name,)


def params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"table": (VOCAB, WIDTH), "up": (WIDTH, 24), "down": (24, WIDTH), "bias": (WIDTH,), "norm": (WIDTH,)}
    drawn = {name: rng.normal(0, 1 / np.sqrt(shape[0]), shape) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def rms(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def block(params: dict, x: jax.Array) -> jax.Array:
    return x + jax.nn.silu(rms(x) * (1 + params["norm"]) @ params["up"]) @ params["down"] + params["bias"]


def test_norms_by_one_plus_a_weight_biases_and_a_tied_head_without_a_norms_weight() -> None:
    def model(params: dict, ids: jax.Array) -> jax.Array:
        return rms(block(params, params["table"][ids] * 4.0)) @ params["table"].T

    graph = graph_of(model, **params(np.random.default_rng(0)))
    found, ids, turn = Rotate()(graph), np.arange(9)[None], random_rotation(WIDTH, 0)
    assert relative(eager(found, ids), eager(graph, ids)) <= 1e-5
    assert set(found.names("weight")) == set(graph.names("weight"))  # both uses of the table turn alike
    np.testing.assert_array_equal(found.weights["norm"], np.zeros(WIDTH))
    bias = np.asarray(graph.weights["bias"], np.float64) @ turn
    np.testing.assert_array_equal(found.weights["bias"], bias.astype(np.float32))


def mean(x: jax.Array) -> jax.Array:
    return x - x.mean(-1, keepdims=True)


def cap(x: jax.Array) -> jax.Array:
    return jax.numpy.tanh(x)


def scaled(x: jax.Array) -> jax.Array:
    return x * jax.numpy.arange(WIDTH)


def shifted(x: jax.Array) -> jax.Array:
    return x + 0.5


def halves(x: jax.Array) -> jax.Array:
    return rms(x.reshape(*x.shape[:2], 2, -1)).reshape(x.shape)


def largest(x: jax.Array) -> jax.Array:
    return x / abs(x).max(-1, keepdims=True)


def wrong_norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x**4).mean(-1, keepdims=True))


REFUSED = {
    mean: "reduce_sum adds up the channels of the residual stream, as a LayerNorm's mean does,",
    cap: "tanh takes the residual stream",
    scaled: "the residual stream is scaled channel by channel",
    shifted: "add joins the residual stream and a number, which is not rotated with it,",
    halves: "reshape takes the channels of the residual stream apart",
    largest: "abs takes the residual stream",
    wrong_norm: "integer_pow",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_an_orthogonal_matrix_does_not_pass(change) -> None:
    def model(params: dict, ids: jax.Array) -> jax.Array:
        return rms(block(params, change(params["table"][ids]))) @ params["table"].T

    line = rf"test_rotate\.py:{change.__code__.co_firstlineno + 1} \({change.__name__}\)"
    with pytest.raises(PassError, match=f"rotate: {REFUSED[change]}.* at .*{line}"):
        Rotate()(graph_of(model, **params(np.random.default_rng(0))))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt2", "as a LayerNorm's mean does, at .*models.py"), ("gemma2", "channel by channel, by .*after1")],
)
def test_models_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        Rotate()(plain(name))


def test_a_channel_that_a_norm_makes_loud() -> None:
    """A channel of x100 that the weights behind a norm take back, as for AWQ: folding the norm is enough."""
    graph = plain("llama")
    for pair in find_pairs(graph)[0]:
        factors = np.ones(pair.channels)
        factors[3] = 0.01
        graph = graph.replace(weights=graph.weights.derive(*pair.recipes(factors)))
    assert error(graph, Rotate(), Quantize("int4:g32")) < 0.5 * error(graph, Quantize("int4:g32"))


def test_a_loud_channel_of_the_stream_is_spread() -> None:
    """Embeddings write a channel 100 times as loud as others, and all readers take it back.

    Activations that are rounded beside it lose the other channels.
    """
    graph = plain("llama")
    weights = {name: np.array(graph.weights[name]) for name in graph.names("weight", "const")}
    weights["embed/embedding"][:, 7] = 100 * np.sign(weights["embed/embedding"][:, 7])
    for pair in find_pairs(graph)[0]:
        for side in pair.readers if pair.by_norm else ():
            weights[side.name][7] /= 100
            weights[side.name] *= 100 / np.sqrt(pair.channels)  # what the norm divides by is the loud channel
    graph = graph.replace(weights=Weights(weights))
    dynamic = Quantize("int8:channel,a=int8_token")
    assert error(graph, Rotate(), dynamic) < 0.5 * error(graph, dynamic)


def error(graph: Graph, *passes: Pass) -> float:
    held_out = tokens(VARIANTS["llama"], 2, 16, seed=99)
    return float(np.square(np.asarray(eager(Pipeline(passes)(graph), held_out) - eager(graph, held_out))).mean())


@pytest.mark.parametrize("after", [(AwqScales("int4:g32"),), (Quantize("int4:g32", method="gptq"),)], ids=str)
def test_passes_after_it(after) -> None:
    graph, given = plain("llama"), [tokens(VARIANTS["llama"], 2, 16, seed=s) for s in range(2)]
    found, ids = Pipeline([Rotate(), *after])(graph, calibration=given), tokens(VARIANTS["llama"], 1, 8)
    bound = 1e-5 if isinstance(after[0], AwqScales) else 0.5
    assert 0 < relative(eager(found, ids), eager(graph, ids)) <= bound


def test_text_and_bad_input() -> None:
    assert Pipeline.parse("rotate{seed=5}", PASSES).passes == (Rotate(seed=5),)
    with pytest.raises(OptionError, match="rotate: seed=-1: expected a whole number"):
        Rotate(seed=-1)
    graph = Quantize("int8")(plain("llama"))
    with pytest.raises(PassError, match="rotate: "):
        Rotate()(graph)
    plain_llama = plain("llama")
    broken = np.array(plain_llama.arrays["layers/0/up/kernel"])
    broken[3, 5] = np.inf
    with pytest.raises(PassError, match=r"rotate: layers/0/up/kernel has 1 of .*, the first inf in row 3, column 5"):
        dict(Rotate()(plain_llama.with_weights({"layers/0/up/kernel": broken})).arrays)
    assert find_pairs(Rotate()(plain_llama))[0]  # norms of one are norms still
