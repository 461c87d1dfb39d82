"""What the real compilers say of a kernel: they run here, and their devices are not needed."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from xlathe.offline import compile_for, compiler_is_installed
from xlathe.target import Target, find_target

TPUS = ("tpu-v5e", "tpu-v5p", "tpu-v6e")
GPUS = ("h100",)


def target_here(name: str) -> Target:
    """The target, or a skipped test where its compiler is not installed; `make test-kernels` installs them."""
    target = find_target(name)
    if not compiler_is_installed(target):
        pytest.skip(f"the compiler for {name} is not installed")
    return target


def avals(*arrays: str) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `bfloat16 2 3`-like texts."""
    return [jax.ShapeDtypeStruct([int(n) for n in sizes], dtype) for dtype, *sizes in map(str.split, arrays)]


def vmem_of(compiled: jax.stages.Compiled) -> int:
    """Bytes of VMEM that the program's Pallas kernel takes; fails where there is not one kernel."""
    calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    (call,) = calls
    (config,) = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', call)
    (size,) = re.findall(r'"memory_space":"1".*?"size":"(\d+)"', config)
    return int(size)


def tpu_plan(name: str, function: Any, *arrays: Any) -> tuple[int, int]:
    """Compiles for a TPU; returns bytes of VMEM of the kernel, and of the program's temporaries."""
    target = target_here(name)
    compiled = compile_for(target, function, *arrays)
    vmem, temporary = vmem_of(compiled), compiled.memory_analysis().temp_size_in_bytes
    assert target.chip is not None and vmem <= target.chip.on_chip
    return vmem, temporary


def simulated_gpu(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The kernel in the simulator of Mosaic GPU, which looks for races, on a GPU of two multiprocessors."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=2)

    @functools.wraps(kernel)
    def run(*operands: Any, **options: Any) -> jax.Array:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return kernel(*operands, interpret=plgpu.InterpretGPUParams(detect_races=True), **options)

    return run


def simulated_tpu(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The kernel in the simulator of Mosaic TPU, where a race is an error and memory that was not written to is NaN."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return functools.partial(kernel, interpret=params)


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """registers: of a thread; spilled, temporary: bytes, of a thread and of the program."""

    registers: int
    spilled: int
    temporary: int


def gpu_plan(name: str, capfd: pytest.CaptureFixture[str], function: Any, *arrays: Any) -> GpuPlan:
    """Compiles for a GPU, with ptxas, in a test that sets MOSAIC_GPU_DUMP_PTXAS."""
    target = target_here(name)
    capfd.readouterr()
    compiled = compile_for(target, function, *arrays)
    captured = "".join(capfd.readouterr())
    (registers,) = re.findall(r"Used (\d+) registers", captured)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", captured)))
    return GpuPlan(int(registers), spilled, compiled.memory_analysis().temp_size_in_bytes)
