"""Methods in one list of passes: rotation, then smoothing, then GPTQ, on a model with a loud channel."""

import jax
import numpy as np
import pytest

from tests.graphs import eager, relative, tokens, traced
from tests.variants import DECODERS
from xlathe.graph import Graph
from xlathe.passes import Canonicalize, Quantize, Rotate, SmoothQuant
from xlathe.passes.quantize.pairs import find_pairs
from xlathe.pipeline import Pass, Pipeline

LLAMA = next(variant for variant in DECODERS if variant.name == "llama")
CALIBRATION = [tokens(LLAMA, 2, 16, seed=seed) for seed in range(8)]
HELD_OUT = tokens(LLAMA, 4, 16, seed=99)


@pytest.fixture(scope="module")
def loud() -> Graph:
    """What norms and up-projections make has a channel 100 times as loud as the others, which its readers take back."""
    graph = Canonicalize()(traced("llama"))
    for pair in find_pairs(graph)[0]:
        factors = np.ones(pair.channels)
        factors[3] = 0.01
        graph = graph.replace(weights=graph.weights.derive(*pair.recipes(factors)))
    return graph


def divergence(graph: Graph, found: Graph) -> float:
    """KL divergence in nats a token, in float64."""
    with jax.enable_x64(True):
        ours, theirs = (jax.nn.log_softmax(np.asarray(eager(g, HELD_OUT), np.float64)) for g in (graph, found))
        return float((np.exp(ours) * (ours - theirs)).sum(-1).mean())


def test_rotation_then_smoothing_then_gptq(loud: Graph) -> None:
    """Expected: floats are what they were when GPTQ begins, and it is closer to them than rounding to nearest behind
    the same passes, and than rounding alone."""
    begun: list[Graph] = []

    def made(*passes: Pass) -> Graph:
        return Pipeline(passes)(loud, calibration=CALIBRATION, planned=lambda plan, graph: begun.append(graph))

    scheme = "int4:g32,a=int8_token"
    found = made(Rotate(), SmoothQuant(), Quantize(scheme, method="gptq"))
    nearest, alone = made(Rotate(), SmoothQuant(), Quantize(scheme)), made(Quantize(scheme))
    assert relative(eager(begun[0], HELD_OUT), eager(loud, HELD_OUT)) <= 1e-5
    assert [record.hits["norm"] for record in found.history[-3:-1]] == [5, 5]
    losses = [divergence(loud, each) for each in (found, nearest, alone)]
    assert losses[0] < 0.8 * losses[1] and losses[0] < 0.5 * losses[2]
