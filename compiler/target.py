"""What programs are compiled for. A table: nothing here asks a device."""

import dataclasses

from xlathe.errors import OptionError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a roofline needs to know of one accelerator, from its maker's data sheet.

    memory: bytes; bandwidth: of that memory, bytes a second; bf16, int8, fp8, int4: dense multiply-adds count as two,
    operations a second, 0 where the matrix unit has no such numbers; on_chip: bytes of VMEM or shared memory that one
    core's kernel can hold; tile: side of the matrix unit, in rows. Of a chip whose cores are devices apart: one core.
    """

    memory: int
    bandwidth: float
    bf16: float
    int8: float
    fp8: float
    int4: float
    on_chip: int
    tile: int


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    platform: the name that XLA knows it by; kernels: the files of `xlathe.kernels` written for it; chip: None where the
    name covers many machines; topology: by which the compiler knows it on a machine without one; device: how a device
    of this kind is called on the machine that has it, in full or its beginning.
    """

    name: str
    platform: str
    kernels: str
    chip: Chip | None = None
    topology: str = ""
    device: str = "cpu"


_KIB, _MIB = 1 << 10, 1 << 20
_V6E = "TPU v6 lite"


def _gpu(name: str, chip: Chip, device: str) -> Target:
    return Target(name, "cuda", "gpu_sm90", chip, device, device)


def _tpu(name: str, chip: Chip, topology: str, device: str) -> Target:
    return Target(name, "tpu", "tpu", chip, topology, device)


TARGETS = (
    Target("cpu", "cpu", "cpu"),
    _gpu("h100", Chip(80 * 10**9, 3.35e12, 9.89e14, 1.979e15, 1.979e15, 0, 227 * _KIB, 64), "NVIDIA H100"),
    _gpu("h200", Chip(141 * 10**9, 4.8e12, 9.89e14, 1.979e15, 1.979e15, 0, 227 * _KIB, 64), "NVIDIA H200"),
    _tpu("tpu-v5e", Chip(17 * 10**9, 8.2e11, 1.97e14, 3.94e14, 0, 7.88e14, 128 * _MIB, 128), "v5e:2x2", "TPU v5 lite"),
    _tpu("tpu-v5p", Chip(103 * 10**9, 2.46e12, 4.59e14, 9.18e14, 0, 1.84e15, 64 * _MIB, 128), "v5p:2x2x1", "TPU v5"),
    _tpu("tpu-v6e", Chip(34 * 10**9, 1.64e12, 9.2e14, 1.84e15, 9.2e14, 3.68e15, 128 * _MIB, 256), "v6e:2x2", _V6E),
    _tpu("tpu-7x", Chip(103 * 10**9, 3.7e12, 1.155e15, 0, 2.3e15, 0, 64 * _MIB, 256), "tpu7x:2x2x1", "TPU7x"),
)
INSTEAD = {"int8": "fp8", "fp8": "int8"}
"""The other 8 bits that activations may be rounded to."""


def find_target(name: str) -> Target:
    """Returns the target called `name`; raises OptionError for an unknown one."""
    for target in TARGETS:
        if name == target.name:
            return target
    raise OptionError(f"no target {name!r}{did_you_mean(str(name), [target.name for target in TARGETS])}")


def find_device(platform: str, kind: str) -> Target | None:
    """Returns the target that a device is, by XLA's names of its platform and kind; None where it is none."""
    fitting = [t for t in TARGETS if t.platform == platform and (t.chip is None or kind.startswith(t.device))]
    return max(fitting, key=lambda target: len(target.device), default=None)


def unit_of(target: Target, activations: str | None) -> str:
    """Returns the numbers that a target multiplies where activations are rounded so (`ops/activations.py`).

    Not rounded, weights of every format are widened to `bf16` on accelerators and to `float32` on CPUs. Rounded, `int8`
    and `fp8` are multiplied as they are; CPUs have no fp8, and multiply the same values as `float32`.
    Raises OptionError where a chip lacks the numbers, and says what to use instead.
    """
    if activations is None:
        return "bf16" if target.chip else "float32"
    kind, _, rest = activations.partition("_")
    if target.chip is None:
        return "float32" if kind == "fp8" else kind
    if getattr(target.chip, kind):
        return kind
    other = INSTEAD[kind]
    instead = f"a={other}_{rest or 'token'}, or " if getattr(target.chip, other) else ""
    raise OptionError(
        f"{target.name} multiplies no {kind}, which activations are rounded to; use {instead}weights alone (no a=), "
        "which are widened to bf16"
    )
