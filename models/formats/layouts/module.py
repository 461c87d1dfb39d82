"""What reading a layout has in common: the tensors of one module, checked, and the matrix that they are."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from xlathe.errors import CheckpointError, brief
from xlathe.models.formats.layouts.integers import SCALES
from xlathe.models.settings import Settings
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import Scaled

FLOATS = tuple(SCALES)
INT32 = (np.dtype(np.int32),)


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear module in a file. where: the file or directory; tensors: by the suffixes of their names."""

    where: str
    name: str
    tensors: Mapping[str, Tensor]

    def take(self, suffix: str, dtypes: Iterable[Any], shape: Sequence[int | None]) -> Tensor:
        """Returns a tensor of these types and this shape, None for any size; raises CheckpointError otherwise."""
        if suffix not in self.tensors:
            raise self.wrong(suffix, f"a tensor {_shown(shape)}", "none")
        tensor, allowed = self.tensors[suffix], [np.dtype(dtype) for dtype in dtypes]
        if tensor.dtype not in allowed:
            raise self.wrong(suffix, " or ".join(map(str, allowed)), tensor.dtype)
        fits = len(tensor.shape) == len(shape) and all(
            n == m for n, m in zip(tensor.shape, shape, strict=True) if m is not None
        )
        if not fits or not all(tensor.shape):
            raise self.wrong(suffix, _shown(shape), list(tensor.shape))
        return tensor

    def refuse_others(self, known: Iterable[str]) -> None:
        """Raises CheckpointError for a tensor that a module of this form has no use for."""
        for suffix in self.tensors:
            if suffix not in known:
                raise self.wrong(suffix, "none: nothing reads it in a module of this form", "one")

    def wrong(self, suffix: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(f"{self.where}: {self.name}.{suffix}: expected {expected}, found {found}")


def _shown(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape)}]"


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint's tensors with matrices in place of modules, and what was not read as it is stored."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def split_modules(
    where: str, tensors: Mapping[str, Tensor], suffixes: Iterable[str], marks: Iterable[str]
) -> tuple[dict[str, Module], dict[str, Tensor]]:
    """Returns the modules that have one of `marks`, with their tensors of these suffixes, and all other tensors."""
    known, wanted = set(suffixes), set(marks)
    named = {name: name.rpartition(".") for name in tensors}
    packed = {module for module, _, suffix in named.values() if suffix in wanted}
    mine: dict[str, dict[str, Tensor]] = {module: {} for module in packed}
    others = {}
    for name, (module, _, suffix) in named.items():
        if module in packed and suffix in known:
            mine[module][suffix] = tensors[name]
        else:
            others[name] = tensors[name]
    modules = dict.fromkeys(module for module, _, _ in named.values() if module in packed)
    return {module: Module(where, module, mine[module]) for module in modules}, others


def matrix(stored: Scaled, n: int, k: int, parts: Mapping[str, Tensor], activations: str | None = None) -> Tensor:
    """Returns a matrix [n, k] that is packed in the parts of a format: float32 for who reads it."""

    def read() -> np.ndarray:
        return np.asarray(stored.dequantize(*(jnp.asarray(parts[name].read()) for name in stored.parts(n, k))))

    return Tensor((n, k), np.dtype(np.float32), read, Packed(str(stored), parts, activations))


def refuse_unknown(settings: Settings, known: Iterable[str]) -> None:
    """Raises CheckpointError for a setting that nobody knows the meaning of; null, false and empty mean nothing."""
    for name, value in settings.values.items():
        if name not in set(known) and value not in (None, False, [], {}, ""):
            raise CheckpointError(f"{settings.where}: {name} is {brief(value)}: expected no setting of that name")


def group_of(settings: Settings) -> int:
    """Returns `group_size`; 0 where it is -1, a group for all inputs."""
    size = settings.values.get("group_size")
    if type(size) is not int or not (size == -1 or 1 <= size <= 2**20):
        raise settings.wrong("group_size", "-1 or a positive whole number", size)
    return 0 if size == -1 else size
