"""Zeros in a whole model: each method on what the sparse weights before make."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from xlathe.errors import OptionError, PassError
from xlathe.passes import Quantize
from xlathe.passes.quantize.methods import find_method
from xlathe.storage import parse_format

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


def sparse(graph: xl.Graph, method: str, scheme: str = "bf16") -> xl.Graph:
    return xl.Pipeline([Quantize(scheme, weights="up|down", method=method)])(graph, calibration=list(TOKENS))


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


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_of_the_scheme_is_the_methods(graph: xl.Graph, method: str) -> None:
    """Expected: the numbers of `keep=2,of=4`, in 9 bits each instead of 16."""
    whole, packed = sparse(graph, f"{method}{{keep=2,of=4}}"), sparse(graph, method, "bf16:2of4")
    for name in ("up", "down"):
        parts = [packed.arrays[f"{name}.{part}"] for part in ("mask", "codes")]
        values = parse_format("bf16:2of4").dequantize(*map(jnp.asarray, parts))
        np.testing.assert_array_equal(values, stored(whole, name))
        assert sum(np.asarray(part).nbytes for part in parts) == stored(whole, name).size * 9 / 8
    expected = np.asarray(whole(TOKENS[:, 0]))
    np.testing.assert_allclose(packed(TOKENS[:, 0]), expected, atol=1e-5 * np.abs(expected).max())


def test_what_lies_without_zeros_is_saved_and_compiled(graph: xl.Graph, tmp_path: Path) -> None:
    packed = sparse(graph, "magnitude", "bf16:2of4")
    packed.save(tmp_path / "saved")
    np.testing.assert_array_equal(xl.load_graph(tmp_path / "saved")(TOKENS[:, 0]), packed(TOKENS[:, 0]))
    program = xl.compile(packed, max_len=48)
    logits = np.asarray(packed(TOKENS[0, :, :40]))[0, -1]
    assert list(program.generate(TOKENS[0, :, :40], max_tokens=1)[0].tokens) == [logits.argmax()]


@pytest.mark.parametrize("scheme", ["int4:g8", "int4:g8,2of4", "int4:g8,asym,2of4", "nf4:g8,2of4"])
def test_zeros_among_levels(graph: xl.Graph, scheme: str) -> None:
    """Before: SparseGPT with a scheme of levels. Expected: half zeros in the scheme's own parts."""
    joint = sparse(graph, "sparse_gpt", scheme)
    planned = parse_format(scheme).parts(HIDDEN, WIDTH)
    parts = [joint.arrays[f"up.{part}"] for part in planned]
    assert [part.shape for part in parts] == [part.shape for part in planned.values()]
    values = np.asarray(parse_format(scheme).dequantize(*map(jnp.asarray, parts)))
    assert (values == 0).mean() >= 0.5
    if "2of4" in scheme:
        assert ((values.reshape(HIDDEN, -1, 4) != 0).sum(-1) <= 2).all()


def test_another_pattern_than_the_schemes_is_refused(graph: xl.Graph) -> None:
    with pytest.raises(OptionError, match="bf16:2of4 keeps 2 of 4"):
        sparse(graph, "wanda{keep=1,of=4}", "bf16:2of4")
    with pytest.raises(OptionError, match="a zero point may leave no zero"):
        sparse(graph, "sparse_gpt", "int4:g8,asym")


def test_groups_that_do_not_divide_are_named(graph: xl.Graph) -> None:
    with pytest.raises(PassError, match=r"down: 40 inputs are no multiple of 7"):
        _ = sparse(graph, "magnitude{keep=2,of=7}").arrays["down.codes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "above 0 and below 1") for text in ("sparsity=1.0", "sparsity=0.0")),
        *((text, "expected 0 < keep < of") for text in ("keep=4,of=4", "keep=2", "keep=3,of=2")),
        ("sparsity=0.9,keep=2,of=4", "2 of 4 says how many stay; leave out sparsity"),
    ],
)
def test_options_out_of_range(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_method(f"wanda{{{text}}}")


def test_levels_are_refused(graph: xl.Graph) -> None:
    with pytest.raises(OptionError, match="zeros are kept among bf16 or f16"):
        Quantize("int4:g8", weights="up", method="wanda")(graph, xl.pipeline.Context(list(TOKENS)))
