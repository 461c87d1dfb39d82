"""What programs are compiled for. A table: nothing here asks a device."""

import dataclasses
import functools

from xlathe.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a roofline needs to know of one accelerator, from its maker's data sheet.

    memory: bytes; bandwidth: of that memory, bytes a second; bf16, int8: dense multiply-adds count as two, operations
    a second; on_chip: bytes of VMEM or shared memory that one core's kernel can hold; tile: side of the matrix unit, in
    rows.
    """

    memory: int
    bandwidth: float
    bf16: float
    int8: float
    on_chip: int
    tile: int


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    platform: the name that XLA knows it by; kernels: the files of `xlathe.kernels` written for it; chip: None where the
    name covers many machines; topology: by which the compiler knows it on a machine without one.
    """

    name: str
    platform: str
    kernels: str
    chip: Chip | None = None
    topology: str = ""


_KIB, _MIB = 1 << 10, 1 << 20

TARGETS = (
    Target("cpu", "cpu", "cpu"),
    Target("h100", "cuda", "gpu_sm90", Chip(80 * 10**9, 3.35e12, 9.89e14, 1.979e15, 227 * _KIB, 64), "NVIDIA H100"),
    Target("h200", "cuda", "gpu_sm90", Chip(141 * 10**9, 4.8e12, 9.89e14, 1.979e15, 227 * _KIB, 64), "NVIDIA H200"),
    Target("tpu-v5e", "tpu", "tpu", Chip(17 * 10**9, 8.2e11, 1.97e14, 3.94e14, 128 * _MIB, 128), "v5e:2x2"),
    Target("tpu-v5p", "tpu", "tpu", Chip(103 * 10**9, 2.46e12, 4.59e14, 9.18e14, 64 * _MIB, 128), "v5p:2x2x1"),
    Target("tpu-v6e", "tpu", "tpu", Chip(34 * 10**9, 1.64e12, 9.2e14, 1.84e15, 128 * _MIB, 256), "v6e:2x2"),
)


@functools.cache
def find_target(name: str | None) -> Target:
    """Returns the target called `name`; None is the CPU. Raises OptionError for an unknown name."""
    for target in TARGETS:
        if name in (None, target.name):
            return target
    raise OptionError(f"no target {name!r}; the targets are {', '.join(target.name for target in TARGETS)}")
