"""Methods in a pipeline: the order of weights, what they are calibrated on, and what they do with too little."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, final

import jax.numpy as jnp
import numpy as np
import pytest

from tests.graphs import graph_of, traced
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.passes import PASSES
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.observe import observe
from xlathe.passes.quantize import Quantize
from xlathe.passes.quantize.calibrate import make_recipes
from xlathe.passes.quantize.method import WeightMethod
from xlathe.pipeline import Context, Pipeline
from xlathe.stats import InputStats
from xlathe.storage import Format

WIDTH = 32


def deep(params: dict, ids: jnp.ndarray) -> jnp.ndarray:
    """A residual stream [b, t, width] through three layers; `shared` is multiplied in two of them."""
    x = params["embedding"][ids]
    for name in ("first", "shared", "second", "shared"):
        x = x + jnp.tanh(x @ params[name])
    return x @ params["head"]


@pytest.fixture(scope="module")
def graph() -> Graph:
    rng = np.random.default_rng(0)
    shapes = {"first": (WIDTH, WIDTH), "shared": (WIDTH, WIDTH), "second": (WIDTH, WIDTH), "head": (WIDTH, WIDTH)}
    params = {name: rng.normal(size=shape).astype(np.float32) / WIDTH**0.5 for name, shape in shapes.items()}
    table = rng.normal(size=(WIDTH, WIDTH)) * np.geomspace(3, 0.1, WIDTH)
    return graph_of(deep, embedding=table.astype(np.float32), **params)


@pytest.mark.parametrize("scheme", ["int4:g32", "int8:channel,a=int8_static"])
@pytest.mark.parametrize("method", ["search", "gptq", "auto_round"])
def test_activations_that_are_no_numbers_are_refused_by_name(graph: Graph, scheme: str, method: str) -> None:
    """Before: a weight with NaN that is not quantized. Expected: the next one's calibration is refused."""
    broken = np.array(graph.weights["first"])
    broken[0, 0] = np.nan
    quantize = Quantize(scheme, rules=(("first|shared", "none"),), method=method)
    with pytest.raises(PassError, match=r"(second|head): the activations of the calibration are not all finite"):
        quantize(graph.with_weights({"first": broken}), Context(batches()))


def batches(count: int = 3) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, WIDTH, (2, 16)) for seed in range(count)]


@final
@dataclasses.dataclass(frozen=True)
class Halved(WeightMethod):
    """Rounds half of a weight to nearest, and checks its statistics against those of the whole graph."""

    statistics: ClassVar[Any] = "gram"

    graph: Graph
    changed: dict[str, np.ndarray]

    def __call__(self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None) -> Any:
        expected = observe(self.graph.with_weights(self.changed), batches(), gram=True).inputs[name]
        assert stats is not None and stats.count == expected.count == (192 if name == "shared" else 96)
        if "shared" not in self.changed:  # its first product was with the weight as it was
            np.testing.assert_allclose(stats.gram, expected.gram, atol=1e-4 * np.abs(expected.gram).max())
        parts = stored.encode(weight / 2)
        self.changed[name] = np.asarray(stored.dequantize(*parts)).T
        return parts


def test_each_weight_is_calibrated_behind_the_changed_ones(graph: Graph) -> None:
    """Whatever becomes of a weight, the statistics of the next are those of a graph with it."""
    method = Halved(graph, {})
    plan = dataclasses.replace(Quantize("int8").plan(graph), method=method)
    makers, _ = make_recipes(plan, graph, Context(batches()))
    assert list(method.changed) == ["first", "second", "shared", "head"]
    for name, make in makers.items():
        np.testing.assert_array_equal(make.value((WIDTH, WIDTH), np.float32), method.changed[name])


def quantized(graph: Graph, method: str, calibration: Sequence[np.ndarray]) -> Graph:
    return Pipeline([Quantize("int3:g8", method=method)])(graph, calibration=calibration)


@pytest.mark.parametrize("method", ["search", "hqq", "clip", "gptq"])
def test_beats_round_to_nearest(graph: Graph, method: str) -> None:
    """HQQ promises no lower error of products, only one that outliers count less in."""
    held_out = np.random.default_rng(99).integers(0, WIDTH, (4, 16))
    nearest, found = (quantized(graph, name, batches(8)) for name in ("rtn", method))
    errors = [float(jnp.square(each(held_out) - graph(held_out)).mean()) for each in (nearest, found)]
    assert errors[1] < {"hqq": 1.3, "gptq": 0.6}.get(method, 0.95) * errors[0]
    assert found.structural_hash == nearest.structural_hash


def test_the_order_of_batches_does_not_matter(graph: Graph) -> None:
    first, second = quantized(graph, "gptq", batches()), quantized(graph, "gptq", batches()[::-1])
    for name in first.names("weight"):
        np.testing.assert_array_equal(first.weights[name], second.weights[name])


def test_short_calibration_is_told(graph: Graph) -> None:
    found = quantized(graph, "gptq", [np.arange(5)[None]])
    note, _ = found.history[-1].notes
    assert note.startswith("the calibration is short: 5 tokens reached first, which sums over 32 columns (4 weights")


def test_an_expert_that_is_never_reached_is_rounded_to_nearest() -> None:
    graph = Canonicalize()(traced("stacked_when_used"))
    options = {"scheme": "int4:g32", "weights": ".*/experts/.*"}
    nearest = Quantize(**options)(graph)
    found = Pipeline([Quantize(**options, method="gptq")])(graph, calibration=[np.full((1, 9), 7)])
    unseen = {note.split(":")[0] for note in found.history[-1].notes if "no token" in note}
    assert unseen
    for name in (n for n in found.names("weight") if n.endswith("ups.codes")):
        members = [name.replace("*", str(e)).removesuffix(".codes") for e in range(len(found.weights[name]))]
        same = [np.array_equal(*each) for each in zip(found.weights[name], nearest.weights[name], strict=True)]
        assert same == [member in unseen for member in members]


def linear(params: dict, ids: jnp.ndarray) -> jnp.ndarray:
    return params["table"][ids] @ params["w"]


def test_bad_input() -> None:
    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(11, 32)).astype(np.float32), "w": rng.normal(size=(32, 11)).astype(np.float32)}
    ids = [rng.integers(0, 11, (2, 8))]
    with pytest.raises(OptionError, match="needs at least one batch"):
        Quantize("int4:g32", method="gptq")(graph_of(linear, **params))
    broken = params | {"w": np.where(np.eye(32, 11) > 0, np.nan, params["w"])}
    with pytest.raises(PassError, match="w has 11 of 352 values that are not finite"):
        Pipeline([Quantize("int4:g32", method="gptq")])(graph_of(linear, **broken), calibration=ids)
    loud = params | {"table": np.where(np.eye(11, 32) > 0, np.inf, params["table"]).astype(np.float32)}
    with pytest.raises(PassError, match="quantize: w: the activations of the calibration are not all finite"):
        Pipeline([Quantize("int4:g32", method="gptq")])(graph_of(linear, **loud), calibration=ids)
    with pytest.raises(OptionError, match="method=gptq of w: it chooses levels and scales"):
        Quantize("bf16", method="gptq")(graph_of(linear, **params))


def test_methods_have_texts() -> None:
    pass_ = Quantize("int4:g32", method="gptq{act_order=false}")
    assert Pipeline.parse(str(pass_), PASSES).passes == (pass_,) and "act_order=false" in str(pass_)
