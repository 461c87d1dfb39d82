"""Zeros in a whole model: each method on what the sparse weights before make."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.passes.decoding import fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.passes import Quantize, Specialize
from xlathe.passes.quantize.methods import find_method
from xlathe.report import weight_bytes
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


@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_the_scheme_are_the_methods(graph: xl.Graph, method: str) -> None:
    """Expected: the numbers of `sparsity=`, in parts as planned."""
    scheme = "bf16:62.5%"
    whole, packed = sparse(graph, f"{method}{{sparsity=0.625}}"), sparse(graph, method, scheme)
    for name in ("up", "down"):
        n, k = stored(whole, name).shape
        told = parse_format(scheme).parts(n, k)
        parts = [packed.arrays[f"{name}.{part}"] for part in told]
        values = parse_format(scheme).dequantize(*map(jnp.asarray, parts))
        np.testing.assert_array_equal(values, stored(whole, name))
        assert (np.asarray(values) == 0).sum() == round(0.625 * n * k)
        assert [np.asarray(part).nbytes for part in parts] == [part.nbytes for part in told.values()]


def test_what_lies_without_zeros_is_saved_and_compiled(graph: xl.Graph, tmp_path: Path) -> None:
    """Expected: files of the bytes that the plan says, and a header."""
    scheme, method = "int3:g8,asym,50%", "rtn"
    packed = sparse(graph, method, scheme)
    packed.save(tmp_path / "saved")
    np.testing.assert_array_equal(xl.load_graph(tmp_path / "saved")(TOKENS[:, 0]), packed(TOKENS[:, 0]))
    planned = Quantize(scheme, weights="up|down", method=method).plan(graph)
    assert sum(entry.after for entry in planned.entries) == weight_bytes(packed) == _file_bytes(tmp_path / "saved")
    program = xl.compile(packed, max_len=48)
    logits = np.asarray(packed(TOKENS[0, :, :40]))[0, -1]
    assert list(program.generate(TOKENS[0, :, :40], max_tokens=1)[0].tokens) == [logits.argmax()]


@pytest.mark.parametrize(
    ("scheme", "method", "kept", "unstored"),
    [
        ("bf16", "wanda{sparsity=0.75}", 0.25, 0),
        ("bf16:2of4", "rtn", 0.5, 960),
        ("int4:g8,75%", "sparse_gpt", 0.25, 1440),
    ],
)
def test_the_plan_says_what_zeros_save(
    graph: xl.Graph, tmp_path: Path, scheme: str, method: str, kept: float, unstored: int
) -> None:
    """Before: 2 * 960 of 4,848 weights get zeros, and the embedding is looked up. Expected: the same in the text, in
    JSON and in the report of what was saved."""
    plan = Quantize(scheme, weights="up|down", method=method).plan(graph)
    zeros = round(1920 * (1 - kept))
    told = json.loads(plan.to_json())
    whole, nominal = 2 * (1920 + WIDTH * VOCAB), 2 * (round(1920 * kept) + WIDTH * VOCAB)
    assert (told["weights"], told["zeros"], told["unstored"]) == (4848, zeros, unstored)
    assert (told["flops"], told["nominal_flops"]) == (whole, nominal)
    assert [tensor["zeros"] for tensor in told["tensors"]] == [zeros // 2, 0, 0, zeros // 2]
    assert sum(tensor["unstored"] for tensor in told["tensors"]) == unstored
    (line,) = plan.remarks
    assert line.startswith(
        f"zeros: {zeros:,} of 4,848 weights, {unstored:,} of them not stored; nominally {nominal:,} of {whole:,} flops"
    )
    assert line.endswith("a mask brings no speed") and line in str(plan).splitlines()
    made = sparse(graph, method, scheme)
    made.save(tmp_path)
    again = xl.load_graph(tmp_path)
    assert any(said.endswith(f": {line}") for said in again.report().splitlines())
    for name in made.names("weight"):
        np.testing.assert_array_equal(again.weights[name], made.weights[name])


def test_operations_of_fixed_tokens_are_not_told(graph: xl.Graph) -> None:
    """What is done for each token cannot be told from what is done once."""
    plan = Quantize("bf16:50%", weights="up|down").plan(xl.Pipeline([Specialize(batch=1, length=8)])(graph))
    assert plan.flops is None and json.loads(plan.to_json())["flops"] is None
    assert plan.remarks[0].endswith("960 of them not stored; XLA multiplies zeros like others: a mask brings no speed")


def test_zeros_of_experts_count_as_often_as_they_are_chosen() -> None:
    """Before: a token goes through 2 of 4 experts of each layer. Expected: half of what these two take."""
    (variant,) = (v for v in DECODERS if v.name == "stacked_when_used")
    experts = fused(variant)
    plan = Quantize("bf16:50%", weights=".*/experts/.*").plan(experts)
    weights = sum(int(np.prod(e.shape)) for e in plan.entries if "/experts/" in e.name)
    dense, nominal = plan.flops
    assert dense - nominal == 2 * (weights * 2 // 4) // 2
    assert not Quantize("bf16").plan(experts).remarks


def _file_bytes(folder: Path) -> int:
    """Returns the bytes of tensors in files, whose first 8 bytes are the length of the header."""
    blobs = [path.read_bytes() for path in folder.glob("*.safetensors")]
    return sum(len(blob) - 8 - int.from_bytes(blob[:8], "little") for blob in blobs)


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
    for method, scheme in (
        ("wanda{keep=1,of=4}", "bf16:2of4"),
        ("magnitude{sparsity=0.7}", "bf16:2of4"),
        ("sparse_gpt{sparsity=0.7}", "bf16:50%"),
        ("sparse_gpt{keep=2,of=4}", "int4:g8,50%"),
        ("wanda{sparsity=0.4}", "bf16:50%"),
    ):
        with pytest.raises(OptionError, match=f"{scheme} says what is zero, 0.5 of the weights; leave out"):
            sparse(graph, method, scheme)
    with pytest.raises(OptionError, match="a zero point may leave no zero"):
        sparse(graph, "sparse_gpt", "int4:g8,asym")
    for method, scheme in (("wanda{sparsity=0.333}", "bf16:33.3%"), ("magnitude{sparsity=0.5}", "bf16:2of4")):
        assert Quantize(scheme, weights="up|down", method=method).plan(graph).remarks  # says the same twice


def test_groups_that_do_not_divide_are_named(graph: xl.Graph) -> None:
    with pytest.raises(PassError, match=r"down: 40 inputs are no multiple of 7"):
        _ = sparse(graph, "magnitude{keep=2,of=7}").arrays["down.codes"]


def test_what_does_not_fit_is_named(graph: xl.Graph) -> None:
    """Before: 24 inputs, of which 7 rows make too few to keep any; and NaN among what would be kept."""
    with pytest.raises(OptionError, match=r"bf16:99.99% keeps 0 of 960; .* down \[40, 24\] is summed over"):
        sparse(graph, "magnitude", "bf16:99.99%")
    broken = np.array(graph.weights["up"])
    broken[3, 5] = np.nan
    with pytest.raises(PassError, match="up has 1 of 960 values that are not finite"):
        _ = sparse(graph.with_weights({"up": broken}), "magnitude", "bf16:50%").arrays["up.codes"]


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
