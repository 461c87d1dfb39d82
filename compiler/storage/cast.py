"""Weights as floats of fewer bits, without a scale."""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp

from xlathe.storage.elements import namespace
from xlathe.storage.format import Format, Part

DTYPES = {"bf16": "bfloat16", "f16": "float16"}


@final
@dataclasses.dataclass(frozen=True)
class Cast(Format):
    """The nearest number of a dtype, `bf16` or `f16`; what is too large for it becomes its largest."""

    name: str

    def __str__(self) -> str:
        return self.name

    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        return {"codes": Part((n, k), jnp.dtype(DTYPES[self.name]))}

    def misfit(self, n: int, k: int) -> str | None:
        return None

    def encode(self, weight: Any) -> tuple[Any, ...]:
        dtype = jnp.dtype(DTYPES[self.name])
        largest = float(jnp.finfo(dtype).max)
        return (namespace(weight).clip(weight, -largest, largest).astype(dtype),)

    def decode(self, *lines: jax.Array) -> jax.Array:
        return lines[0].astype(jnp.float32)
