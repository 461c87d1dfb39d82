"""How the parts of a quantized weight are made from it, tensor by tensor, when they are asked for."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import PassError
from xlathe.ops.activations import INT8_MAX
from xlathe.passes.quantize.method import Method, WeightMethod
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Layout
from xlathe.stats import InputStats
from xlathe.storage import Format
from xlathe.storage.elements import FP8_E4M3


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Encode:
    """Recipe of the parts of a weight.

    name: for messages. layout: which of its axes are rows, and which are summed over. stats: None where neither method
    nor scheme needs them. made: what the method made already, where weights are quantized one after the other.
    """

    name: str
    layout: Layout
    scheme: Scheme
    method: Method
    stats: InputStats | None = None
    made: tuple[np.ndarray, ...] | None = None

    def __call__(self, weight: Any) -> tuple[np.ndarray, ...]:
        return (*(self.make(weight) if self.made is None else self.made), *self._step())

    def make(self, weight: Any) -> tuple[np.ndarray, ...]:
        """Returns the parts of the storage format."""
        assert isinstance(self.method, WeightMethod)  # what a section is made of at once is made already
        matrix = self.matrix(weight)
        try:
            return self.method(self.name, matrix, self.scheme.stored, self.stats)
        except FloatingPointError as error:  # numbers that the scales of blocks do not reach
            raise PassError(f"quantize: {self.name} {list(matrix.shape)}: {error}; a rule can leave it out") from None

    def matrix(self, weight: Any) -> np.ndarray:
        """Returns a weight as float32 [n, k]. Raises PassError where it is not finite."""
        matrix = self.layout.matrix(weight)
        check_finite(self.name, matrix)
        return matrix

    def value(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns what the weight is from now on, of the shape and dtype that it had."""
        assert self.made is not None
        matrix = _dequantized(self.scheme.stored, *map(jnp.asarray, self.made))
        return self.layout.weight(np.asarray(matrix), shape).astype(dtype)

    def _step(self) -> tuple[np.ndarray, ...]:
        """Returns the step of static activations, whose largest in calibration becomes the last level."""
        if not self.scheme.is_static:
            return ()
        assert self.stats is not None and self.scheme.activations is not None
        last = INT8_MAX if self.scheme.activations.startswith("int8") else FP8_E4M3.largest
        return (np.array(self.stats.absmax.max() / last, np.float32),)


@functools.partial(jax.jit, static_argnums=0)
def _dequantized(stored: Format, *parts: jax.Array) -> jax.Array:
    return stored.dequantize(*parts)


@final
@dataclasses.dataclass(frozen=True)
class EachExpert:
    """Recipe of parts [experts, ...] from the matrix of each expert, one at a time. encoders: one an expert."""

    encoders: tuple[Callable[[Any], tuple[np.ndarray, ...]], ...]

    def __call__(self, weights: Iterable[Any]) -> tuple[np.ndarray, ...]:
        made = (encoder(weight) for encoder, weight in zip(self.encoders, weights, strict=True))
        return tuple(np.stack(parts) for parts in zip(*made, strict=True))


def check_finite(name: str, matrix: np.ndarray, by: str = "quantize") -> None:
    """Raises PassError where a weight [n, k] or [k] holds NaN or infinities: no scale is right for it."""
    bad = ~np.isfinite(matrix)
    if bad.any():
        at = tuple(np.argwhere(bad)[0].tolist())
        places = ", ".join(f"{axis} {i}" for axis, i in zip(("row", "column")[-len(at) :], at, strict=False))
        hint = "; a rule can leave it out" if by == "quantize" else ""
        raise PassError(
            f"{by}: {name} has {np.count_nonzero(bad)} of {matrix.size} values that are not finite, the first "
            f"{matrix[at]} in {places} of {list(matrix.shape)}{hint}"
        )


def check_calibrated(name: str, stats: InputStats, by: str = "quantize") -> None:
    """Raises PassError where activations were not finite, or so large that sums of their squares are not."""
    if not stats.is_finite:
        largest = float(np.max(stats.absmax))
        what = f"reach {largest:.3g}, whose squares are beyond float32; look at the weights that make them"
        raise PassError(
            f"{by}: {name}: the activations of the calibration "
            + (what if np.isfinite(largest) else "are not all finite")
        )
