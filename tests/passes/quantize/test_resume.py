"""Runs that are interrupted, and runs that get their tokens and threads in other ways: always the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import graph_of
from tests.models.tiny import LLAMA, write_tiny
from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.passes import Canonicalize, FuseAttention, Quantize
from xlathe.passes.quantize.work import PARTS, ROWS, Work
from xlathe.pipeline import Pipeline

CONFIG = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 101, "num_hidden_layers": 2}
WIDTH, LENGTH, COUNT = 32, 24, 5
SECTIONS = 2 * 2 + 1  # attention and feed-forward of two layers, and the head
RUN = """if True:
    import os, signal, sys
    from pathlib import Path
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    from tests.passes.quantize.test_resume import quantized, opened
    def progress(text, fraction):
        if text == "quantizing" and fraction > float(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    folder = Path(sys.argv[1])
    quantized(opened(folder), folder / "work", progress=progress).save(folder / sys.argv[2])
"""


class Stopped(Exception):
    """What ends a run in the middle."""


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 101, (COUNT, LENGTH), dtype=np.int32)


def opened(folder: Path) -> Graph:
    return Pipeline([Canonicalize(), FuseAttention()])(xl.from_pretrained(folder / "model"))


def quantized(graph: Graph, work: Path | None, method: str = "gptq", calibration=None, **options) -> Graph:
    given = list(tokens()[:, None]) if calibration is None else calibration
    return Pipeline([Quantize("int4:g32", method=method)])(graph, calibration=given, work=work, **options)


def deep(params: dict, ids: jnp.ndarray) -> jnp.ndarray:
    """A residual stream [b, t, width] through sections that are alike."""
    x = params["embedding"][ids]
    for i in range(4):
        x = x + jnp.tanh(x @ params[f"layer{i}"])
    return x @ params["head"]


def small(**changed: np.ndarray) -> Graph:
    rng = np.random.default_rng(0)
    shapes = {"embedding": (101, WIDTH), **{f"layer{i}": (WIDTH, WIDTH) for i in range(4)}, "head": (WIDTH, 101)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return graph_of(deep, max_len=LENGTH, **{**params, **changed})


def assert_same_bytes(found: Graph, expected: Graph) -> None:
    assert set(found.names("weight")) == set(expected.names("weight"))
    for name in expected.names("weight"):
        assert np.asarray(found.weights[name]).tobytes() == np.asarray(expected.weights[name]).tobytes(), name


def stop(text: str, fraction: float) -> None:
    if text == "quantizing" and fraction > 0.7:
        raise Stopped


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are as many as the cores of this machine")
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Before: SIGKILL after two thirds of the products, on one core. Expected: the rest is made, as on all cores."""
    write_tiny(tmp_path / "model", CONFIG)
    command = [sys.executable, "-c", RUN, str(tmp_path), "out"]
    killed = subprocess.run([*command, "0.66"], cwd=Path(__file__).parents[3], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list((tmp_path / "work").glob("*" + PARTS))) == 2 and not (tmp_path / "out").exists()
    assert len(list((tmp_path / "work").glob("*" + ROWS))) == 1
    subprocess.run([*command, "2"], cwd=Path(__file__).parents[3], check=True)
    found, whole = xl.load_graph(tmp_path / "out"), quantized(opened(tmp_path), None)
    assert f"went on after 2 of {SECTIONS} sections that {tmp_path / 'work'} had" in found.history[-1].notes
    whole.save(tmp_path / "whole")
    for file in ("weights.safetensors", "graph.py"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("method", ["gptq", "auto_round{steps=2}"])
@pytest.mark.parametrize("rows", [True, False])
def test_every_method_that_goes_in_order_can_go_on(tmp_path: Path, method: str, rows: bool) -> None:
    """Also where activations are gone: they are computed again, through the sections that are finished."""
    with pytest.raises(PassError, match="Stopped"):
        quantized(small(), tmp_path, method, progress=stop)
    for path in tmp_path.glob("*" + ROWS) if not rows else ():
        path.unlink()
    found = quantized(small(), tmp_path, method)
    assert found.history[-1].notes[0] == f"went on after 3 of 5 sections that {tmp_path} had"
    assert_same_bytes(found, quantized(small(), None, method))


def test_how_rows_are_given_in_batches_does_not_matter() -> None:
    expected = quantized(small(), None)
    assert_same_bytes(quantized(small(), None, calibration=[tokens()[:2], tokens()[2:]]), expected)


@pytest.mark.parametrize("other", ["tokens", "method", "weights"])
def test_state_of_another_run_is_left_alone(tmp_path: Path, other: str) -> None:
    quantized(small(), tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*" + PARTS)}
    if other == "tokens":
        found = quantized(small(), tmp_path, calibration=[(tokens() + 1) % 101])
    elif other == "method":
        found = quantized(small(), tmp_path, method="clip")
    else:
        found = quantized(small(embedding=np.ones((101, WIDTH), np.float32)), tmp_path)
    assert found.history[-1].notes[-2] == f"{tmp_path} has 5 sections of another run as well, which are not used"
    assert not any("went on" in note for note in found.history[-1].notes)
    assert kept.items() <= {path.name: path.read_bytes() for path in tmp_path.glob("*" + PARTS)}.items()


def test_what_another_run_shares_is_taken(tmp_path: Path) -> None:
    """Before: all is finished, and then a weight changes. Expected: what comes before it is not made again."""
    quantized(small(), tmp_path)
    changed = small(layer2=np.eye(WIDTH, dtype=np.float32))
    found = quantized(changed, tmp_path)
    assert found.history[-1].notes[0] == f"went on after 2 of 5 sections that {tmp_path} had"
    assert_same_bytes(found, quantized(changed, None))


def test_only_what_a_run_kept_is_removed(tmp_path: Path) -> None:
    """Also where what it took was finished long ago; what others finished stays, hours of work maybe."""
    before = time.time()
    for name in ("other" + PARTS, "other" + ROWS, "mine.txt"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (before - 3600,) * 2)
    quantized(small(), tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, (before - 3600,) * 2)
    quantized(small(), tmp_path)
    Work(tmp_path).remove(since=before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "other" + PARTS, "other" + ROWS]
    Work(tmp_path).remove(since=before - 7200)
    (tmp_path / "mine.txt").unlink()
    Work(tmp_path).remove(since=before)
    assert not tmp_path.exists()
