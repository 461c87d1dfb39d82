"""Graphs of the zoo, traced once a test run."""

import functools
from collections.abc import Callable

import jax
import numpy as np

import xlathe as xl
from tests.variants import DECODERS, REFUSED, Variant, as_function
from xlathe import jaxpr as ir

ZOO = {variant.name: variant for variant in DECODERS + REFUSED}


@functools.cache
def traced(name: str) -> xl.Graph:
    """The graph of a decoder, or a look-alike, of the zoo."""
    function, weights = as_function(ZOO[name].build())
    return xl.trace(function, weights, max_len=ZOO[name].max_len)


def eager(graph: xl.Graph, ids: np.ndarray) -> jax.Array:
    """Logits of a forward graph, one operation at a time: the zoo shares what is compiled."""
    sizes = {"b": ids.shape[0], "t": ids.shape[1]}
    return ir.evaluate_at(graph.jaxpr, graph.bind_names({**graph.weights, "tokens": ids}), sizes)[0]


def tokens(variant: Variant, b: int, t: int, seed: int = 0) -> np.ndarray:
    """Returns int32 [b, t]."""
    return np.random.default_rng(seed).integers(0, variant.vocab, (b, t), dtype=np.int32)


def relative(found: jax.Array, expected: jax.Array) -> float:
    """max |difference| / max |expected|, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def graph_of(function: Callable, *, max_len: int = 16, **params: np.ndarray) -> xl.Graph:
    """Traces a function of a dictionary of arrays and tokens."""
    return xl.trace(function, params, max_len=max_len)
