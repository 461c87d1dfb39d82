"""Zeros in a whole model: each method on what the sparse weights before make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from xlathe.errors import OptionError, PassError
from xlathe.passes import Quantize
from xlathe.passes.quantize.methods import find_method

VOCAB, WIDTH, HIDDEN = 61, 24, 40
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 1, 48), dtype=np.int32)
METHODS = ("magnitude", "wanda", "sparse_gpt")


@pytest.fixture(scope="module")
def graph() -> xl.Graph:
    rng = np.random.default_rng(0)
    loud = np.exp(rng.normal(size=WIDTH)).astype(np.float32)  # channels differ, so that it matters which are read
    params = {
        "embed": (rng.normal(size=(VOCAB, WIDTH)) * loud).astype(np.float32),
        "up": rng.normal(size=(WIDTH, HIDDEN)).astype(np.float32) / 5,
        "down": rng.normal(size=(HIDDEN, WIDTH)).astype(np.float32) / 6,
        "head": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32) / 5,
    }

    def forward(p: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens]
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return x @ p["head"]

    return xl.trace(forward, params, max_len=48)


def sparse(graph: xl.Graph, method: str) -> xl.Graph:
    return xl.Pipeline([Quantize("bf16", weights="up|down", method=method)])(graph, calibration=list(TOKENS))


def stored(graph: xl.Graph, name: str) -> np.ndarray:
    """The weight as it is stored, float32, an output a row."""
    return np.asarray(graph.arrays[f"{name}.codes"], np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_counted(graph: xl.Graph, method: str) -> None:
    half, pattern = sparse(graph, method), sparse(graph, f"{method}{{keep=1,of=4}}")
    for name in ("up", "down"):
        assert (stored(half, name) == 0).mean() == 0.5
        groups = stored(pattern, name).reshape(len(stored(pattern, name)), -1, 4)
        assert ((groups != 0).sum(-1) == 1).all()
    assert "head" in half.names("weight")


def test_wanda_reads_what_sparse_weights_made(graph: xl.Graph) -> None:
    small, w = sparse(graph, "wanda"), {name: np.asarray(graph.weights[name]) for name in graph.names("weight")}
    x = w["embed"][TOKENS.ravel()]
    up = stored(small, "up")
    inner = np.maximum(x @ up.T, 0)
    for name, seen in (("up", x), ("down", inner)):
        score = np.abs(w[name].T) * np.linalg.norm(seen, axis=0)
        rows = np.arange(len(score))[:, None]
        gone = np.zeros(score.shape, bool)
        gone[rows, np.argsort(score, axis=1)[:, : score.shape[1] // 2]] = True
        expected = np.where(gone, 0, w[name].T).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(stored(small, name), expected)


def test_what_a_method_knows_lowers_the_error_of_the_model(graph: xl.Graph) -> None:
    expected = np.asarray(graph(TOKENS[:, 0]))
    errors = [np.square(np.asarray(sparse(graph, method)(TOKENS[:, 0])) - expected).sum() for method in METHODS]
    assert errors[2] < errors[1] < errors[0]


def test_groups_that_do_not_divide_are_named(graph: xl.Graph) -> None:
    with pytest.raises(PassError, match=r"down: 40 inputs are no multiple of 7"):
        _ = sparse(graph, "magnitude{keep=2,of=7}").arrays["down.codes"]


@pytest.mark.parametrize("text", ["sparsity=1.0", "sparsity=0.0", "keep=4,of=4", "keep=2", "keep=3,of=2"])
def test_options_out_of_range(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected 0 < keep < of|above 0 and below 1"):
        find_method(f"wanda{{{text}}}")


def test_levels_are_refused(graph: xl.Graph) -> None:
    with pytest.raises(OptionError, match="zeros are kept among bf16 or f16"):
        Quantize("int4:g8", weights="up", method="wanda")(graph, xl.pipeline.Context(list(TOKENS)))
