"""Programs for a machine that is not there, on one without its compiler (`tests/kernels` has one with it)."""

import dataclasses
from pathlib import Path

import pytest
from flax import nnx

import xlathe as xl
from xlathe import bundle, bundle_check, offline
from xlathe.aot import Buckets, to_step
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.offline import plan_for, runs_here, target_here
from xlathe.passes import Quantize
from xlathe.target import TARGETS, find_device, find_target

CONFIG = LlamaConfig(61, width=32, layers=1, query_heads=4, key_value_heads=2, head_dim=8, hidden=64)


@pytest.fixture
def _no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture(scope="module")
def graph() -> xl.Graph:
    return Quantize()(xl.trace(Llama(CONFIG, rngs=nnx.Rngs(0)), max_len=32))


@pytest.mark.usefixtures("_no_compilers")
@pytest.mark.parametrize(("name", "platform", "extra"), [("tpu-v5e", "tpu", "tpu"), ("h100", "cuda", "gpu")])
def test_a_program_for_another_machine_is_saved_and_not_run(
    graph: xl.Graph, tmp_path: Path, name: str, platform: str, extra: str
) -> None:
    program = xl.compile(graph, max_len=16, chunks=(4,), unit=4, target=name)
    assert program.memory.temporaries is None
    assert f"not known without the compiler: pip install 'xlathe[{extra}]'" in program.memory.to_text()
    with pytest.raises(xl.XlatheError, match=f"this program is for {name} and cannot run here: save it"):
        program.generate([[1, 2]], 2)
    with pytest.raises(xl.XlatheError, match=f"this program is for {name}"):
        next(program.stream([[1, 2]], 2))

    program.save(tmp_path / "bundle")
    manifest = bundle_check.read_manifest(tmp_path / "bundle")
    assert (manifest.target, manifest.platform) == (name, platform)
    weights = {array.name: array.aval for array in manifest.inputs}
    assert sum(a.size * a.dtype.itemsize for a in weights.values()) == program.memory.weights
    with pytest.raises(xl.BundleError, match=f"was compiled for {platform}, but this process runs on cpu"):
        xl.load(tmp_path / "bundle")


def test_weights_that_do_not_fit_are_not_compiled(graph: xl.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "compiler_is_installed", lambda target: True)
    plan = plan_for(to_step(graph), Buckets.of(1, 16, 4, (4,)), find_target("h100"), memory=1000)
    assert plan.temporaries is None and plan.unknown == "not compiled: weights and cache alone do not fit"


def test_the_target_of_this_process() -> None:
    assert target_here().name == "cpu"
    assert [target.name for target in TARGETS if runs_here(target)] == ["cpu"]


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA A100-SXM4-40GB", None),
        ("tpu", "TPU v5 lite", "tpu-v5e"),
        ("tpu", "TPU v5", "tpu-v5p"),
        ("tpu", "TPU v4", None),
    ],
)
def test_devices_are_found_by_what_they_are_called(platform: str, kind: str, name: str | None) -> None:
    target = find_device(platform, kind)
    assert (None if target is None else target.name) == name


def test_an_unknown_device_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "find_device", lambda platform, kind: None)
    with pytest.raises(xl.OptionError, match=r"this machine has a cpu \(cpu\), which is no target"):
        target_here()


def test_kernels_of_another_device_are_not_run(graph: xl.Graph, tmp_path: Path) -> None:
    """A GPU that is no h100 serves an h100's bundle by the reference programs."""
    program = xl.compile(graph, max_len=16, chunks=(4,), unit=4)
    program.save(tmp_path / "bundle")
    manifest = bundle_check.read_manifest(tmp_path / "bundle")
    elsewhere = dataclasses.replace(manifest, target="h100", custom_calls=("mosaic_gpu_v2",))
    assert bundle._why_no_kernels(elsewhere) == "kernels were written for h100, and this is another device"
    assert bundle._why_no_kernels(dataclasses.replace(elsewhere, target="cpu")) is None
