"""Calibration texts that are too short: what reads what says so, and from where on it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.graphs import graph_of
from xlathe.graph import Graph
from xlathe.passes.quantize import AwqScales, Quantize, SmoothQuant
from xlathe.passes.quantize.enough import TOKENS
from xlathe.pipeline import Pass, Pipeline

WIDTH, VOCAB = 32, 24
PRODUCTS = "tokens reached head, which sums over 32 columns (1 weights are like this); x^T x leaves some open"
AVERAGES = "tokens reached head (1 weights are like this); means and largest values take 128"


def normed(params: dict, ids: jax.Array) -> jax.Array:
    x = params["table"][ids]
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * params["norm"] @ params["head"]


@pytest.fixture(scope="module")
def graph() -> Graph:
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCAB, WIDTH), "norm": (WIDTH,), "head": (WIDTH, VOCAB)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return graph_of(normed, max_len=TOKENS, **params)


@pytest.mark.parametrize(
    ("pass_", "enough", "remark"),
    [
        (Quantize("int4:g32", method="gptq"), WIDTH, PRODUCTS),
        (Quantize("int4:g32", method="auto_round{steps=1}"), WIDTH, PRODUCTS),
        (Quantize("int4:g32", method="search"), TOKENS, AVERAGES),
        (Quantize("q4_0", method="search"), TOKENS, AVERAGES),
        (Quantize("int8:channel,a=int8_static"), TOKENS, AVERAGES),
        (Quantize("int8:channel,a=int8_static", method="gptq"), TOKENS, AVERAGES),
        (AwqScales("int4:g32"), TOKENS, AVERAGES),
        (SmoothQuant(), TOKENS, AVERAGES),
    ],
    ids=lambda value: str(value) if isinstance(value, Pass) else "",
)
def test_a_short_calibration_is_told(graph: Graph, pass_, enough: int, remark: str) -> None:
    """Before: as many tokens as it takes, and one less. Expected: the latter is told, and nothing refused."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, TOKENS))
    for count, expected in ((enough, []), (enough - 1, [f"the calibration is short: {enough - 1} {remark}"])):
        notes = Pipeline([pass_])(graph, calibration=[tokens[:, :count]]).history[-1].notes
        assert [note for note in notes if "short" in note] == expected


def test_rounding_to_nearest_asks_for_nothing(graph: Graph) -> None:
    assert Pipeline([Quantize("int4:g32")])(graph, calibration=[np.zeros((1, 1), np.int32)]).history[-1].notes == ()
