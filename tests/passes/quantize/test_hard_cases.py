"""What calibration and weights can be like at worst, through the whole pass, and what GPTQ gives for what it takes."""

import dataclasses
from typing import Any, ClassVar, final

import jax.numpy as jnp
import numpy as np
import pytest

from tests.graphs import graph_of
from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.passes.quantize import Quantize
from xlathe.passes.quantize.calibrate import make_recipes
from xlathe.passes.quantize.calibrated import Gptq
from xlathe.passes.quantize.method import WeightMethod
from xlathe.pipeline import Context, Pipeline
from xlathe.stats import InputStats
from xlathe.storage import Format, parse_format

METHODS = ["search", "hqq", "clip", "gptq", "auto_round{steps=3}"]
WIDTH, VOCAB = 32, 24


def linear(params: dict, ids: jnp.ndarray) -> jnp.ndarray:
    return params["table"][ids] @ params["w"]


def model(weight: np.ndarray) -> Graph:
    table = np.random.default_rng(1).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    return graph_of(linear, table=table, w=np.ascontiguousarray(weight.T))


def weight() -> np.ndarray:
    """Float32 [n, k]."""
    return np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)


def quantized(weight: np.ndarray, method: str, ids: np.ndarray | None = None) -> np.ndarray:
    """Returns what a weight stands for after the pass, [n, k]."""
    tokens = np.random.default_rng(2).integers(0, VOCAB, (4, 16)) if ids is None else ids
    found = Pipeline([Quantize("int4:g16", method=method)])(model(weight), calibration=[tokens])
    parts = [found.weights[f"w.{part}"] for part in ("codes", "scale")]
    return np.asarray(parse_format("int4:g16").dequantize(*map(jnp.asarray, parts)))


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_groups_of_zeros_stay_zeros(method: str) -> None:
    w = weight()
    w[3], w[5, 16:] = 0, 0
    found = quantized(w, method)
    assert not found[3].any() and not found[5, 16:].any() and found[5, :16].any()
    assert not quantized(np.zeros_like(w), method).any()


@pytest.mark.parametrize("method", METHODS)
def test_an_outlier_of_1e30_stays_in_its_row(method: str) -> None:
    """Expected: finite numbers, the outlier to a step of its scale, and other rows as they are without it.

    The loss of AutoRound is one number for all rows, here infinite: nothing is better than where it began.
    """
    w = weight()
    w[7, 20] = 1e30
    found, without = quantized(w, method), quantized(weight(), "gptq" if method.startswith("auto_round") else method)
    assert np.isfinite(found).all() and abs(found[7, 20] / 1e30 - 1) < 0.26
    others = np.delete(np.arange(VOCAB), 7)
    np.testing.assert_array_equal(found[others], without[others])


@pytest.mark.parametrize("method", METHODS)
def test_one_token_over_and_over(method: str) -> None:
    """Before: x^T x of rank 1. Expected: damping makes it usable, and the one product that was seen comes out well."""
    found = quantized(weight(), method, np.full((2, 16), 9))
    x = np.asarray(model(weight()).weights["table"])[9]
    nearest = quantized(weight(), "rtn")
    assert np.isfinite(found).all()
    if method != "hqq":  # which sees no token
        assert np.abs((found - weight()) @ x).mean() < np.abs((nearest - weight()) @ x).mean()


def test_what_is_singular_for_any_damping_is_refused_with_all_that_is_known() -> None:
    gram = np.array([[1.0, 5.0], [5.0, 1.0]])
    stats = InputStats(np.asarray(7), np.ones(2, np.float32), np.ones(2), np.ones(2), gram)
    expected = (
        r"quantize: layers/0/up, calibrated on 7 tokens: the sum of x\^T x is singular: no Cholesky factor with "
        r"0\.01, 0\.1, 1\.0 of its mean diagonal added"
    )
    with pytest.raises(PassError, match=expected):
        Gptq()("layers/0/up", np.ones((3, 2), np.float32), parse_format("int4:g2"), stats)


@final
@dataclasses.dataclass(frozen=True)
class Compared(WeightMethod):
    """GPTQ with scales that just reach, beside round to nearest with the same. errors: by weight, of weights and of
    products, each by both."""

    statistics: ClassVar[Any] = "gram"

    errors: dict[str, tuple[float, float, float, float]]

    def __call__(self, name: str, weight: np.ndarray, stored: Format, stats: InputStats | None) -> Any:
        assert stats is not None and stats.gram is not None
        parts = Gptq(search=False)(name, weight, stored, stats)
        errors = []
        for made in (parts, stored.encode(weight)):
            difference = weight - np.asarray(stored.dequantize(*map(jnp.asarray, made)), np.float64)
            errors += [np.square(difference).sum(), np.trace(difference @ stats.gram @ difference.T)]
        self.errors[name] = tuple(map(float, errors))  # type: ignore[assignment]
        return parts


def deep(params: dict, ids: jnp.ndarray) -> jnp.ndarray:
    x = params["embedding"][ids]
    for i in range(3):
        x = x + jnp.tanh(x @ params[f"layer{i}"])
    return x @ params["head"]


def test_gptq_gives_error_of_weights_for_error_of_products_in_every_layer() -> None:
    rng = np.random.default_rng(0)
    shapes = {"embedding": (61, WIDTH), **{f"layer{i}": (WIDTH, WIDTH) for i in range(3)}, "head": (WIDTH, 61)}
    params = {name: rng.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    params["embedding"] *= np.geomspace(10, 0.1, WIDTH).astype(np.float32)  # x^T x is ill-conditioned
    graph, method = graph_of(deep, **params), Compared({})
    plan = dataclasses.replace(Quantize("int4:g16").plan(graph), method=method)
    make_recipes(plan, graph, Context([rng.integers(0, 61, (8, 16))]))
    assert list(method.errors) == ["layer0", "layer1", "layer2", "head"]
    for ours, products, nearest, nearest_products in method.errors.values():
        assert ours > nearest and products < 0.6 * nearest_products
