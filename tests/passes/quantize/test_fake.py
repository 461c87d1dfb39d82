"""Quantization-aware training: the graph computes what the quantized one will, and its gradients pass the rounding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xlathe as xl
from tests.graphs import graph_of
from tests.passes.decoding import difference, fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.ops.fake_quantize import fake_quantize, fake_round
from xlathe.passes import FakeQuantize, Quantize
from xlathe.storage import parse_format

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
BATCH = {"tokens": TOKENS}


def named(name: str) -> Graph:
    return fused(next(v for v in DECODERS if v.name == name))


def loss_of(graph: Graph, arrays: Mapping[str, Any]) -> jax.Array:
    logits = jax.nn.log_softmax(graph.logits(arrays, BATCH)[:, :-1])
    return -jnp.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1).mean()


def gradient(graph: Graph, arrays: Mapping[str, Any]) -> Any:
    floats = {name: arrays[name] for name in graph.names("weight")}
    fixed = {name: arrays[name] for name in graph.names("const")}
    return jax.jit(jax.grad(lambda floats: loss_of(graph, {**fixed, **floats})))(floats)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        *(("tied_head", "int4:g8"), ("sorted_and_back", "nvfp4"), ("llama", "bf16")),
        *(pytest.param("tied_head", text, marks=pytest.mark.breadth) for text in ("int3:g8,asym", "fp8_e4m3:b16x16")),
    ],
)
def test_it_computes_what_quantize_makes(model: str, scheme: str, tmp_path: Path) -> None:
    before = named(model)
    after = FakeQuantize(scheme)(before)
    assert difference(after(TOKENS), Quantize(scheme)(before)(TOKENS)) <= 1e-5
    assert difference(after(TOKENS), before(TOKENS)) > 1e-4
    assert after.names("weight") == before.names("weight")
    after.save(tmp_path)
    np.testing.assert_array_equal(xl.load_graph(tmp_path)(TOKENS), after(TOKENS))


@pytest.mark.parametrize("scheme", ["int8:channel,a=int8_token", "int4:g32,a=int8", "fp8_e4m3:channel,a=fp8_token"])
@pytest.mark.parametrize("model", ["llama", "nnx_multi_head_attention"])
def test_activations_are_rounded_too(scheme: str, model: str) -> None:
    before = named(model)
    after = FakeQuantize(scheme)(before)
    assert difference(after(TOKENS), Quantize(scheme)(before)(TOKENS)) <= 1e-4
    weights_alone = FakeQuantize(scheme.rpartition(",")[0])(before)
    assert difference(after(TOKENS), weights_alone(TOKENS)) > 1e-3


def test_gradients_are_those_at_the_rounded_weights() -> None:
    """The law of the straight-through estimator, by the float graph alone."""
    before = named("llama")
    after, stored = FakeQuantize("int4:g8")(before), parse_format("int4:g8")
    name = "layers/1/up/kernel"
    rounded = dict(before.arrays)
    for entry in Quantize("int4:g8").plan(before).entries:
        if entry.layout is not None:
            matrix = stored.dequantize(*stored.encode(entry.layout.matrix(rounded[entry.name])))
            rounded[entry.name] = entry.layout.weight(matrix, entry.shape)
    found = gradient(after, after.arrays)[name]
    expected = gradient(before, rounded)[name]
    assert difference(found, expected) <= 1e-5


def test_training_beats_rounding() -> None:
    """Two bits a weight: round to nearest, and the same after 60 steps of Adam through the rounding."""
    before = named("llama")
    student = FakeQuantize("int2:g8")(before)
    weights = {name: student.arrays[name] for name in student.names("weight")}
    fixed = {name: array for name, array in student.arrays.items() if name not in weights}
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(weights: Any, state: Any) -> Any:
        gradients = jax.grad(lambda weights: loss_of(student, {**fixed, **weights}))(weights)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for _ in range(60):
        weights, state = step(weights, state)
    plain, trained = (Quantize("int2:g8")(graph) for graph in (before, before.with_weights(weights)))
    assert loss_of(trained, trained.arrays) < 0.5 * loss_of(plain, plain.arrays)
    assert difference(trained(TOKENS), student.with_weights(weights)(TOKENS)) <= 1e-5


def test_a_weight_that_is_not_finite_is_named_or_is_nan() -> None:
    """Expected: an error where the weight is the graph's; a loss and gradients of NaN where it comes into a program."""
    rng = np.random.default_rng(1)
    table, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((61, 16), (16, 61)))
    before = graph_of(lambda params, ids: params["table"][ids] @ params["w"], table=table, w=weight)
    weight = weight.copy()
    weight[3, 2] = np.nan
    after, broken = (FakeQuantize("int4:g8")(graph) for graph in (before, before.with_weights({"w": weight})))
    expected = r"fake_quantize: w has 1 of 976 values that are not finite, the first nan in row 2, column 3"
    with pytest.raises(PassError, match=expected):
        broken(TOKENS)
    loss, gradients = jax.value_and_grad(lambda w: loss_of(after, {**after.arrays, "w": w}))(jnp.asarray(weight))
    assert np.isnan(loss) and np.isnan(gradients).any()


@pytest.mark.parametrize(
    "scheme", ["int4:g8", "int4:g8,asym", "fp8_e4m3:channel", "fp4_e2m1:g8,s=e8m0", "nf4:g8", "bf16"]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rounding_hides_no_weight_that_is_not_finite(scheme: str, bad: float) -> None:
    assert np.isnan(fake_quantize(jnp.ones((4, 16)).at[2, 3].set(bad), format=scheme)[2, 3])


@pytest.mark.parametrize("activations", ["int8", "int8_token", "fp8_token"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_nan(activations: str, bad: float) -> None:
    assert np.isnan(fake_round(jnp.ones((2, 64)).at[1, 40].set(bad), activations=activations)[1, 40])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8:channel,a=int8_static"}, "int8_static: the steps of static activations come from calibr"),
        ({"scheme": "int9"}, "'int9' is not known"),
        ({"rules": ((".*", "int8:channel,a=fp8_static"),)}, "a step a token, as in a=int8_token, is found as it goes"),
    ],
)
def test_schemes_that_cannot_be_trained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FakeQuantize(**options)
