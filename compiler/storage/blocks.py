"""Weights as the packed blocks of llama.cpp's files, byte for byte."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.kernels.gguf_blocks.encode import encode_rows
from xlathe.kernels.gguf_blocks.layouts import LAYOUTS, Layout
from xlathe.storage.block_values import VALUES
from xlathe.storage.format import Format, Part


@final
@dataclasses.dataclass(frozen=True)
class Blocks(Format):
    """Consecutive weights of a row in blocks of 32 or 256, whose bytes hold their scales too, as GGUF has them.

    name: a key of `VALUES`, `q4_k`. A weight is what ggml's own decoder makes of the bytes, bit for bit in float32.
    """

    name: str

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name.upper()]

    def __str__(self) -> str:
        return self.name

    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        return {"blocks": Part((n, k // self.layout.numbers * self.layout.bytes), jnp.dtype("uint8"))}

    def misfit(self, n: int, k: int) -> str | None:
        if k % self.layout.numbers == 0:
            return None
        fit = [name for name in VALUES if k % LAYOUTS[name.upper()].numbers == 0]
        return f"blocks of {self.layout.numbers} do not fill {k}; {', '.join(fit) or 'no type of blocks'} would"

    def encode(self, weight: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Returns the bytes that llama.cpp writes for a weight.

        importance: float32 [k], weights of the squared errors (an importance matrix), or None. Raises
        FloatingPointError for numbers of 2**30 and more, and for scales that float16 does not hold.
        """
        return (encode_rows(weight, self.name.upper(), importance),)

    def decode(self, *lines: jax.Array) -> jax.Array:
        (line,) = lines
        blocks = line.reshape(*line.shape[:-1], -1, self.layout.bytes)
        return VALUES[self.name](blocks).reshape(*line.shape[:-1], -1)
