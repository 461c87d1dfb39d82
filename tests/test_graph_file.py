"""Graphs on disk: what is saved reads back; what is missing, damaged or foreign gets one clear error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import xlathe as xl
from tests.graphs import ZOO, graph_of
from tests.passes.decoding import fused
from xlathe.graph import Weights
from xlathe.passes import Canonicalize, KVCache, Quantize
from xlathe.printer import to_text
from xlathe.report import count_parameters
from xlathe.rewrite import Packed, pack_inputs

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
IDS = np.array([[1, 2, 3, 10]], np.int32)


def model(p, ids):
    x = p["e"][ids] * p["half"].astype(jnp.float32) + p["codes"].astype(jnp.float32) * p["scalar"]
    return jnp.where(p["mask"], x, 0.0) @ p["e"].T


@pytest.fixture
def graph():
    codes, mask = np.arange(4, dtype=np.int8), np.array([True, False, True, True])
    half = np.asarray(jnp.linspace(0, 1, 4).astype(jnp.bfloat16))
    return graph_of(model, e=E, half=half, codes=codes, mask=mask, scalar=np.float32(0.5))


@pytest.fixture
def saved(graph, tmp_path):
    graph.save(tmp_path / "g")
    return tmp_path / "g"


def test_reads_back(graph, saved):
    read = xl.load_graph(saved)
    assert to_text(read) == to_text(graph) and read.max_len == graph.max_len and read.inputs == graph.inputs
    for name in graph.names("weight", "const"):
        assert np.asarray(read.weights[name]).dtype == graph.weights[name].dtype
        assert np.array_equal(read.weights[name], graph.weights[name])
        assert np.shape(read.weights[name]) == np.shape(graph.weights[name])
    assert np.array_equal(read(IDS), graph(IDS)) and read.tokenizer is None


def test_history_and_tokenizer_read_back(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    graph = xl.trace(lambda p, ids: p["e"][ids] @ p["e"].T, {"e": E}, max_len=8, tokenizer=tokenizer)
    graph = Canonicalize()(graph)
    graph.save(tmp_path)
    read = xl.load_graph(tmp_path)
    assert read.history == graph.history and read.tokenizer.encode("b").ids == [1]


def test_quantized_step_reads_back(tmp_path):
    """Expected: weights are saved as the recipes made them, and the step computes the same bits."""
    graph = KVCache()(Quantize()(fused(ZOO["multi_query"])))
    graph.save(tmp_path)
    read = xl.load_graph(tmp_path)
    assert to_text(read) == to_text(graph) and read.is_step and not read.weights.recipes
    assert any(np.asarray(read.weights[name]).dtype == np.int8 for name in read.names("weight"))
    assert np.array_equal(read(IDS), graph(IDS))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"activations": "int8"}])
def test_int4_step_reads_back(options, tmp_path):
    """Expected: packed codes and bfloat16 scales come back as they were, and so do the bits of the logits."""
    quantize = Quantize("int4", weights="layers/.*", **options)
    graph = KVCache()(quantize(fused(ZOO["multi_query"])))
    graph.save(tmp_path)
    read = xl.load_graph(tmp_path)
    assert to_text(read) == to_text(graph) and count_parameters(read) == count_parameters(graph)
    dtypes = {str(np.asarray(read.weights[name]).dtype) for name in read.names("weight")}
    assert dtypes == {"uint8", "bfloat16", "float32"}
    assert np.array_equal(read(IDS), graph(IDS))


def test_sizes_are_reported_the_same_when_read_back(tmp_path):
    """Expected: scales are no parameters, whether a graph was saved once, twice or never, also quantized in between."""
    whole = fused(ZOO["multi_query"])
    first = Quantize(weights="layers/0/.*")(whole)
    read = saved_and_read(first, tmp_path / "first")
    both = saved_and_read(Quantize()(read), tmp_path / "both")
    trained = sum(whole.aval(name).size for name in whole.names("weight"))
    for graph in (first, read, both):
        assert count_parameters(graph) == trained < sum(graph.aval(name).size for name in graph.names("weight"))
    assert len(both.weights.origins) > len(read.weights.origins) > 0
    assert read.report() == first.report()


def saved_and_read(graph, folder):
    graph.save(folder)
    return xl.load_graph(folder)


def test_files_are_readable_as_others_are(saved):
    (saved / "other").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved / "other").stat().st_mode}


def test_arrays_stay_on_disk(saved):
    assert not xl.load_graph(saved).weights["e"].flags.owndata


def test_saving_in_place_of_what_was_loaded(saved):
    """Before: arrays are views of the file that is written. Expected: the new file holds them, whole."""
    before = xl.load_graph(saved)
    array = np.array(before.weights["e"])
    before.save(saved)
    np.testing.assert_array_equal(xl.load_graph(saved).weights["e"], array)
    np.testing.assert_array_equal(before.weights["e"], array)


def test_a_recipe_runs_once_however_many_arrays_it_makes(tmp_path):
    runs = []

    def make(array):
        runs.append(array.shape)
        return array[:2], array[2:].astype(np.int8)

    graph = xl.trace(lambda p, tokens: p["e"][tokens], params={"e": np.ones((4, 4), np.float32)}, max_len=8)
    parts = {"a": shape(2, 4), "b": shape(2, 4, dtype=np.int8)}
    packed = Packed(parts, make, lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]))
    pack_inputs(graph, {"e": packed}).save(tmp_path)
    assert runs == [(4, 4)]
    assert {array.shape for array in xl.load_graph(tmp_path).weights.values()} == {(2, 4)}


def shape(*sizes, dtype=np.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("name", ["graph.py", "graph.json", "weights.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(xl.GraphFileError, match=name):
        xl.load_graph(saved)


def test_a_place_that_cannot_be_written(graph, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "g"):
        with pytest.raises(xl.GraphFileError, match=r"file.* cannot be written: "):
            graph.save(place)


@pytest.mark.parametrize("place", [None, 3])
def test_what_is_no_path(graph, place):
    for use in (graph.save, xl.load_graph):
        with pytest.raises(xl.GraphFileError, match=f"expected the path of a directory, got {place}"):
            use(place)


def test_missing_directory(tmp_path):
    with pytest.raises(xl.GraphFileError, match="cannot be read"):
        xl.load_graph(tmp_path / "nowhere")


def test_program_errors_name_file_and_line(saved):
    text = (saved / "graph.py").read_text()
    (saved / "graph.py").write_text(text.replace("dot_general(x", "dot_generall(x"))
    with pytest.raises(xl.GraphFileError, match=r"graph.py: line \d+: unknown name 'dot_generall'; did you mean"):
        xl.load_graph(saved)


def test_nothing_is_executed(saved, tmp_path):
    trap = tmp_path / "trap"
    text = (saved / "graph.py").read_text()
    (saved / "graph.py").write_text(f"open({str(trap)!r}, 'w').close()\n{text}")
    with pytest.raises(xl.GraphFileError, match="line 1"):
        xl.load_graph(saved)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "e"}, "no array 'e'"),
        (lambda a: a | {"e": a["e"][:-1]}, r"'e' is float32\[10, 4\], the program takes float32\[11, 4\]"),
        (lambda a: a | {"e": a["e"].astype(np.float16)}, r"'e' is float16\[11, 4\]"),
        (lambda a: a | {"mask": a["mask"].astype(np.int8)}, "'mask' is int8"),
    ],
)
def test_wrong_arrays(saved, change, reason):
    path = saved / "weights.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(xl.GraphFileError, match=reason):
        xl.load_graph(saved)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("name", ["graph.py", "graph.json", "weights.safetensors"])
def test_truncated_files(saved, name, share):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(xl.GraphFileError):
        xl.load_graph(saved)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "does not describe a graph"),
        ({"version": 99}, "version 99"),
        ({"max_len": -1}, "max_len"),
        ({"max_len": "64"}, "max_len"),
        ({"history": [{"name": 3}]}, "history"),
        ({"history": 7}, "history"),
        ({"origins": 7}, "origins"),
        ({"origins": [{"name": "e"}]}, "origins"),
        ({"origins": [{"name": "e", "shape": [1.5], "targets": []}]}, r"origins: 'e' has the shape \[1.5\]"),
        ({"origins": [{"name": "e", "shape": 3, "targets": []}]}, "origins"),
    ],
)
def test_wrong_description(saved, change, reason):
    path = saved / "graph.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(xl.GraphFileError, match=reason):
        xl.load_graph(saved)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '"' * 7, "[" * 100_000])
def test_description_that_is_none(saved, text):
    (saved / "graph.json").write_text(text)
    with pytest.raises(xl.GraphFileError, match=r"graph.json"):
        xl.load_graph(saved)


def test_a_graph_takes_the_place_of_another_when_it_is_whole(saved):
    """What fails on the way leaves the old one, also where its own weights are read from there."""
    before, again = xl.load_graph(saved), xl.load_graph(saved)
    (saved / "tokenizer.json").write_text("{}")  # of another graph
    avals = {name: again.aval(name) for name in again.names("weight", "const")}
    lost = {name: jax.ShapeDtypeStruct(aval.shape, aval.dtype) for name, aval in avals.items()}
    with pytest.raises(xl.errors.XlatheError, match="a shape and no value"):
        again.replace(weights=Weights(lost)).save(saved)
    assert sorted(file.name for file in saved.iterdir() if file.name.startswith(".")) == []
    again.save(saved)
    after = xl.load_graph(saved)
    assert after.structural_hash == before.structural_hash and after.tokenizer is None
    for name in before.names("weight"):
        np.testing.assert_array_equal(after.weights[name], before.weights[name])


def test_what_others_left_in_a_folder_stays(graph, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(xl.GraphFileError, match=r"holds tokenizer.json, which is of no graph"):
        graph.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_broken_tokenizer(saved):
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(xl.GraphFileError, match="no tokenizer"):
        xl.load_graph(saved)


def test_dtype_that_files_cannot_hold(tmp_path):
    graph = graph_of(lambda p, ids: p["e"][ids] @ p["e"].T + p["q"].astype(jnp.float32), e=E,
                     q=np.zeros(11, jnp.int4))  # fmt: skip
    with pytest.raises(xl.GraphFileError, match="'q' is int4"):
        graph.save(tmp_path)
