"""Calibration statistics against NumPy."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from xlathe.errors import OptionError
from xlathe.passes.observe import observe
from xlathe.stats import Stats


def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
    x = params["embed"][tokens]
    heads = jnp.einsum("btd,dhe->bthe", x, params["in"])
    return jnp.einsum("bthe,ehv->btv", jnp.sin(heads), params["out"])  # summed over axes 1 and 0 of `out`


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (11, 6), "in": (6, 2, 3), "out": (3, 2, 11)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_statistics_of_every_product(params: dict[str, np.ndarray]) -> None:
    graph = xlathe.trace(model, params=params, max_len=8)
    batches = list(np.random.default_rng(1).integers(0, 11, (2, 3, 8)))
    found = observe(graph, batches, gram=True).inputs
    x = params["embed"][np.concatenate([b.reshape(-1) for b in batches])].astype(np.float64)
    middle = np.sin(np.einsum("nd,dhe->nhe", x, params["in"])).reshape(len(x), -1)
    assert set(found) == {"in", "out"}
    for name, expected in (("in", x), ("out", middle)):
        stats = found[name]
        assert int(stats.count) == 48
        np.testing.assert_allclose(stats.absmax, np.abs(expected).max(0), rtol=1e-6)
        np.testing.assert_allclose(stats.sum_squares, (expected**2).sum(0), rtol=1e-5)
        np.testing.assert_allclose(stats.sum_absolute, np.abs(expected).sum(0), rtol=1e-5)
        np.testing.assert_allclose(stats.gram, expected.T @ expected, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(params: dict[str, np.ndarray], tmp_path) -> None:
    graph = xlathe.trace(model, params=params, max_len=8)
    stats = observe(graph, [np.arange(8)[None]])
    stats.save(tmp_path / "stats.safetensors")
    again = Stats.load(tmp_path / "stats.safetensors")
    assert set(again.inputs) == set(stats.inputs)
    for name, found in again.inputs.items():
        assert found.gram is None
        np.testing.assert_array_equal(found.sum_squares, stats.inputs[name].sum_squares)


def test_bad_input(params: dict[str, np.ndarray], tmp_path) -> None:
    graph = xlathe.trace(model, params=params, max_len=8)
    with pytest.raises(OptionError, match=r"needs at least one batch of int32 tokens \[b, t\], got none"):
        observe(graph, [])
    (tmp_path / "stats.safetensors").write_bytes(b"no")
    with pytest.raises(OptionError, match="cannot be read"):
        Stats.load(tmp_path / "stats.safetensors")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are as many as the cores of this machine")
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    """Before: 4,096 tokens [64], whose products XLA adds up in as many parts as there are threads."""
    code = """if True:
        import os, sys
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
        import jax, numpy as np, hashlib
        from xlathe.passes.observe import _statistics
        x = np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)
        found = jax.jit(lambda x: _statistics(x, True))(x)
        print({name: hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for name, value in found.items()})
    """
    told = [subprocess.run([sys.executable, "-c", code, n], capture_output=True, check=True).stdout for n in "12"]
    assert told[0] == told[1]
