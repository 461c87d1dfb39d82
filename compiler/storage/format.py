"""How a weight is stored: which arrays it becomes, and what they stand for."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """One array that a weight [n, k] is stored as.

    shape, dtype: of the array. rows: how many rows of the weight share a line of it; 0: all of them, and the array has
    no axis for rows.
    """

    shape: tuple[int, ...]
    dtype: Any
    rows: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Format(abc.ABC):
    """A way to store float32 [n, k]. `str` of it is text that `parse_format` reads back; equal text is equal meaning.

    A row is never stored together with others beyond the scales that they share, so that rows can be looked up. The
    first part has n lines.
    """

    @abc.abstractmethod
    def __str__(self) -> str:
        """The text form, `int4:g32`."""

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are zero and not stored."""
        return 0.0

    @abc.abstractmethod
    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        """Returns what is stored, by the suffix of its name, in the order of operands."""

    @abc.abstractmethod
    def misfit(self, n: int, k: int) -> str | None:
        """Says why a weight [n, k] cannot be stored like this, and what could; None where it can."""

    @abc.abstractmethod
    def encode(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the parts of finite float32 [n, k], rounded to nearest."""

    @abc.abstractmethod
    def decode(self, *lines: jax.Array) -> jax.Array:
        """Returns rows float32 [..., k] of a line of each part for each of them (`take_lines`, `all_lines`, which give
        floats of 8 bits as uint8)."""

    def bits(self, n: int, k: int) -> float:
        """Returns stored bits a weight, scales included."""
        return 8 * sum(part.nbytes for part in self.parts(n, k).values()) / (n * k)

    def dequantize(self, *parts: jax.Array) -> jax.Array:
        """Returns the weight that the parts stand for, float32 [n, k]."""
        return self.decode(*all_lines(self, *parts))


def shares(stored: Format) -> list[int]:
    """Returns `Part.rows` of each part, which do not depend on sizes."""
    return [part.rows for part in stored.parts(1, 1 << 20).values()]


def as_bytes(part: jax.Array) -> jax.Array:
    """Returns floats of 8 bits as their bits: to move some of an array, XLA for CPUs would convert all of it."""
    small = jnp.issubdtype(part.dtype, jnp.floating) and part.dtype.itemsize == 1
    return jax.lax.bitcast_convert_type(part, jnp.uint8) if small else part


def take_lines(stored: Format, index: jax.Array, *parts: jax.Array) -> list[jax.Array]:
    """Returns a line of each part for every row in `index`, an int array; out of range, the nearest."""
    return [
        jnp.take(as_bytes(part), index if rows == 1 else index // rows, axis=0, mode="clip") if rows else part
        for part, rows in zip(parts, shares(stored), strict=False)
    ]


def all_lines(stored: Format, *parts: jax.Array) -> list[jax.Array]:
    """Returns a line of each part for every row of the weight."""
    n = parts[0].shape[0]
    return [
        jnp.repeat(as_bytes(part), rows, axis=0)[:n] if rows > 1 else as_bytes(part)
        for part, rows in zip(parts, shares(stored), strict=False)
    ]
