"""What a quantized weight is stored as, and what a product with it is."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp

from xlathe.errors import OptionError
from xlathe.ops.quantized_dot import BLOCK, dequantize
from xlathe.passes.quantize.rtn import RoundGroups, RoundToNearest
from xlathe.passes.quantize.uses import Layout

SHOWN = 6  # groups that would fit, in a message


class Scheme(abc.ABC):
    """The inputs that replace a weight [n, k], and the attributes of `quantized_dot` with them."""

    @abc.abstractmethod
    def parts(self, n: int, k: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of what is stored, by the suffix of its name."""

    @abc.abstractmethod
    def attributes(self) -> Mapping[str, Any]:
        """Returns the attributes of the operation beside `out_dtype`."""

    @abc.abstractmethod
    def recipe(self, layout: Layout) -> Callable[..., Any]:
        """Returns what makes the parts of a weight."""

    @abc.abstractmethod
    def dequantize(self, *parts: jax.Array) -> jax.Array:
        """Returns rows of the weight, float32 [..., k], of the same rows of the parts."""

    @abc.abstractmethod
    def check(self, name: str, shape: Sequence[int], k: int) -> None:
        """Raises OptionError where a weight does not fit; k: the columns that are summed over."""


@final
@dataclasses.dataclass(frozen=True)
class Int8Channels(Scheme):
    """8 bits, symmetric, one float32 scale a row."""

    def parts(self, n: int, k: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"codes": jax.ShapeDtypeStruct((n, k), jnp.int8), "scale": jax.ShapeDtypeStruct((n,), jnp.float32)}

    def attributes(self) -> Mapping[str, Any]:
        return {}

    def recipe(self, layout: Layout) -> Callable[..., Any]:
        return RoundToNearest(layout.free, layout.contracted)

    def dequantize(self, *parts: jax.Array) -> jax.Array:
        codes, scale = parts
        return codes.astype(jnp.float32) * scale[..., None]

    def check(self, name: str, shape: Sequence[int], k: int) -> None:
        """Every weight fits."""


@final
@dataclasses.dataclass(frozen=True)
class Int4Groups(Scheme):
    """4 bits, two a byte, a bfloat16 scale a group of columns: 4.5 bits a weight with groups of 32.

    symmetric: otherwise a group has a zero point too, of 8 bits. activations: None, or `int8` a block of 32.
    """

    group: int
    symmetric: bool
    activations: str | None

    def parts(self, n: int, k: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        groups = (n, k // self.group)
        parts = {
            "codes": jax.ShapeDtypeStruct((n, k // 2), jnp.uint8),
            "scale": jax.ShapeDtypeStruct(groups, jnp.bfloat16),
        }
        return parts if self.symmetric else {**parts, "zero": jax.ShapeDtypeStruct(groups, jnp.uint8)}

    def attributes(self) -> Mapping[str, Any]:
        return {"bits": 4, "group": self.group, "activations": self.activations}

    def recipe(self, layout: Layout) -> Callable[..., Any]:
        return RoundGroups(layout.free, layout.contracted, self.group, self.symmetric)

    def dequantize(self, *parts: jax.Array) -> jax.Array:
        return dequantize(*parts, group=self.group)

    def check(self, name: str, shape: Sequence[int], k: int) -> None:
        if not k % self.group:
            return
        step = BLOCK if self.activations else 2
        fit = sorted((g for g in range(step, k + 1, step) if not k % g), key=lambda g: abs(g - self.group))
        hint = f"group={', '.join(map(str, sorted(fit[:SHOWN])))} would" if fit else "no group would"
        raise OptionError(
            f"quantize: group={self.group} does not divide the {k} values that {name} {list(shape)} is summed over; "
            f"{hint}, and weights= leaves it out"
        )
