"""Weights as levels of an element times a scale that a block of them shares.

What a rounding method works with, on NumPy or JAX arrays, also under `jit`, in float32 throughout:

    steps = stored.steps(*stored.bounds(weight))        # what blocks share, as it will be stored; `fit` is both
    scale, zero = stored.spread(steps, weight.shape)    # the same for each weight, [n, k] or what broadcasts to it
    levels = stored.nearest(weight, scale, zero)        # a level each; any other choice of levels is as good
    values = stored.values(levels, scale, zero)         # what they stand for: (level - zero) * scale
    parts = stored.pack(levels, steps)                  # NumPy: the arrays that are stored

`bounds`, `steps` and `spread` take a slice of columns as well as the whole weight, where it begins and ends with a
block (`columns` of them): so a method may fit a block after it moved errors there from earlier ones. What covers the
whole tensor, `outer`, must then come from it: `stored.steps(low, high, outer=steps.outer)`. A search for better steps
moves the bounds (`low * c, high * c`) or makes its own `Steps` through `stored.rounded`, so that what it finds is what
is stored.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from xlathe.storage.elements import (
    BIAS,
    FP8_E4M3,
    INTEGERS,
    Element,
    exponent_of,
    find_element,
    namespace,
    power_of_two,
    round_to_float,
)
from xlathe.storage.format import Format, Part

SHOWN = 6  # groups that would fit, in a message
SCALES: Mapping[str, tuple[int, int, float] | None] = {  # explicit bits, least normal exponent, largest; None: float32
    "f32": None,
    "bf16": (7, -119, float(ml_dtypes.finfo("bfloat16").max)),
    "f16": (10, -14, 65504.0),
    "e4m3": (3, -6, 448.0),
}
"""Types of scales that are rounded to nearest; `e8m0` beside them has powers of two alone. The least normal exponent
of bfloat16 is -126: below 2**-119 its steps would be too small for float32 on machines that flush denormals."""
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "e4m3": "float8_e4m3fn", "e8m0": "uint8"}
ZEROS = {"u8": "uint8", "bf16": "bfloat16", "f16": "float16"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What the weights of a block share. A block that the weight's end cuts counts as one.

    scale: float32 [blocks of rows, blocks of columns], as stored. zero: like it, the level that stands for 0, or None.
    outer: float32 [], which multiplies all scales of a tensor, or None.
    """

    scale: Any
    zero: Any = None
    outer: Any = None


@final
@dataclasses.dataclass(frozen=True)
class Scaled(Format):
    """(level - zero) * scale, computed like this in float32; with the scales of less than float32 it is exact.

    element: the levels, by name. rows, columns: of the block that shares a scale; 0: all of them. scale: its type.
    `e4m3` comes with a float32 factor for the tensor: level * (scale * outer). zero: the type of zero points, or "".

    Symmetric integers of less than 8 bits use all their codes: the weight of largest magnitude of a block is the least
    level, and the scale may be negative, as in ggml's Q4_0. Without zero points a block of zeros has the scale 0.
    """

    element: str
    rows: int
    columns: int
    scale: str
    zero: str = ""

    @property
    def levels(self) -> Element:
        return find_element(self.element, signed=not self.zero)

    def __str__(self) -> str:
        from xlathe.storage.text import print_scaled

        return print_scaled(self)

    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        unit = self.levels
        codes = (n, k) if unit.bits == 8 else (n, k * unit.bits // 8)
        element: Any = "uint8" if unit.bits < 8 else unit.pack(np.zeros((1, 1), np.float32)).dtype
        shape = {0: (), 1: (n,)}.get(self.rows, (math.ceil(n / max(self.rows, 1)),))
        shape = (*shape, math.ceil(k / self.columns)) if self.columns else shape
        shared = {"scale": DTYPES[self.scale]} | ({"zero": ZEROS[self.zero]} if self.zero else {})
        parts = {name: Part(shape, jnp.dtype(dtype), self.rows) for name, dtype in shared.items()}
        outer = {"outer": Part((), jnp.dtype("float32"), 0)} if self.scale == "e4m3" else {}
        return {"codes": Part(codes, jnp.dtype(element))} | parts | outer

    def misfit(self, n: int, k: int) -> str | None:
        unit = self.levels.unit
        if self.rows == 1 and self.columns and k % self.columns:
            fit = sorted((g for g in range(unit, k + 1, unit) if not k % g), key=lambda g: abs(g - self.columns))
            hint = f"g{', g'.join(map(str, sorted(fit[:SHOWN])))} would" if fit else "no group would"
            return f"group={self.columns} does not divide {k}; {hint}"
        if k % unit:
            return f"{unit} codes of {self.levels.bits} bits fill whole bytes, which does not divide {k}"
        return None

    def bounds(self, weight: Any) -> tuple[Any, Any]:
        """Returns the least and the largest weight of each block, 0 among them: float32 [blocks, blocks]."""
        xp, (n, k) = namespace(weight), weight.shape
        r, c = self.rows or n, self.columns or k
        padded = xp.pad(weight, ((0, -n % r), (0, -k % c))) if n % r or k % c else weight
        blocks = padded.reshape(-(-n // r), r, -(-k // c), c)
        return xp.minimum(blocks.min(axis=(1, 3)), 0), xp.maximum(blocks.max(axis=(1, 3)), 0)

    def fit(self, weight: Any, outer: Any = None) -> Steps:
        """Returns the steps that just reach the largest weights."""
        return self.steps(*self.bounds(weight), outer=outer)

    def steps(self, low: Any, high: Any, outer: Any = None) -> Steps:
        """Returns the steps of blocks whose weights lie between low and high, float32 [blocks, blocks] around 0."""
        xp, levels = namespace(low), self.levels
        if self.zero:
            step = self.rounded(high / levels.largest - low / levels.largest, xp.zeros_like(low)).scale
            return self.rounded(step, -low / xp.where(step == 0, 1, step))
        largest = xp.maximum(-low, high)
        if self.scale == "e8m0":  # the exponents of both maxima apart, as in the OCP specification of MX formats
            power = exponent_of(largest) - math.floor(math.log2(levels.largest))
            return Steps(xp.where(largest > 0, power_of_two(xp.maximum(power, 1 - BIAS)), 0))
        if self.element in INTEGERS and levels.bits < 8:
            return self.rounded(xp.where(-low >= high, low, high) / -(levels.largest + 1))
        return self.rounded(largest / levels.largest, outer=outer)

    def rounded(self, scale: Any, zero: Any = None, outer: Any = None) -> Steps:
        """Returns steps as they can be stored, of float32 scales [blocks, blocks] and levels that stand for 0."""
        xp, form = namespace(scale), SCALES[self.scale]
        if self.scale == "e4m3":
            outer = xp.abs(scale).max() / SCALES["e4m3"][2] if outer is None else outer  # type: ignore[index]
            scale = scale / xp.where(outer == 0, 1, outer)
        scale = scale if form is None else round_to_float(scale, *form)
        if not self.zero:
            return Steps(scale, None, outer)
        if self.zero == "u8":
            return Steps(scale, xp.clip(xp.rint(zero), 0, self.levels.largest))
        return Steps(scale, round_to_float(zero, *SCALES[self.zero]))  # type: ignore[misc]

    def spread(self, steps: Steps, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Returns scale, `outer` in it, and zero (0 without one) of each weight: float32 [n, k], an axis may be 1."""
        xp, (n, k) = namespace(steps.scale), shape
        scale = steps.scale if steps.outer is None else steps.scale * steps.outer

        def each(array: Any) -> Any:
            wide = xp.repeat(array, self.rows, axis=0)[:n] if self.rows > 1 else array
            return xp.repeat(wide, self.columns, axis=1)[:, :k] if self.columns else wide

        return each(scale), 0 if steps.zero is None else each(steps.zero)

    def nearest(self, weight: Any, scale: Any, zero: Any = 0) -> Any:
        """Returns the level nearest to each weight; scale and zero as `spread` returns them."""
        xp = namespace(weight)
        return self.levels.nearest(weight / xp.where(scale == 0, 1, scale) + zero)

    def values(self, levels: Any, scale: Any, zero: Any = 0) -> Any:
        """Returns what levels stand for."""
        return (levels - zero) * scale

    def pack(self, levels: Any, steps: Steps) -> tuple[np.ndarray, ...]:
        """Returns the parts of levels [n, k] and of the steps of all their blocks."""
        levels = np.asarray(levels, np.float32)
        shapes = self.parts(*levels.shape)
        scale = np.asarray(steps.scale, np.float32)
        if self.scale == "e8m0":
            scale = exponent_of(scale) + BIAS
        found = {"codes": self.levels.pack(levels), "scale": scale, "zero": steps.zero, "outer": steps.outer}
        return tuple(
            np.ascontiguousarray(np.asarray(found[name]).astype(part.dtype)).reshape(part.shape)
            for name, part in shapes.items()
        )

    def encode(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        steps = self.fit(weight)
        return self.pack(self.nearest(weight, *self.spread(steps, weight.shape)), steps)

    def decode(self, *lines: jax.Array) -> jax.Array:
        codes, *shared = lines
        return self.scaled(self.levels.unpack(codes), *shared)

    def scaled(self, levels: jax.Array, scale: jax.Array, *more: jax.Array) -> jax.Array:
        """Returns rows float32 [..., k] of their levels and a line of each other part."""
        rest = list(more)
        if self.zero:
            levels = levels - self._wide(rest.pop(0).astype(jnp.float32), levels.shape[-1])
        if self.scale != "e8m0":
            wide = FP8_E4M3.unpack(scale) if self.scale == "e4m3" else scale.astype(jnp.float32)
            return levels * self._wide(wide * rest.pop(0) if rest else wide, levels.shape[-1])
        # 2**-127 is no normal number: it is 2**-126 for a half.
        powers = jax.lax.bitcast_convert_type(jnp.maximum(scale, 1).astype(jnp.uint32) << 23, jnp.float32)
        halves = jnp.where(scale == 0, 0.5, jnp.where(scale == 255, jnp.nan, 1.0)).astype(jnp.float32)
        return levels * self._wide(halves, levels.shape[-1]) * self._wide(powers, levels.shape[-1])

    def grouped(self, codes: jax.Array, *shared: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (level - zero) float32 [n, k] and the scale float32 [n, groups], for blocks of one row."""
        assert self.rows == 1 and self.columns and self.scale in ("f32", "bf16", "f16")
        levels, (scale, *zero) = self.levels.unpack(codes), shared
        wide = [self._wide(each.astype(jnp.float32), levels.shape[-1]) for each in zero]
        return levels - wide[0] if wide else levels, scale.astype(jnp.float32)

    def _wide(self, of_blocks: jax.Array, k: int) -> jax.Array:
        """Returns what belongs to each column, [..., k], or 1 in its place, of a line for every row."""
        if self.columns:
            return jnp.repeat(of_blocks, self.columns, axis=-1)[..., :k]
        return of_blocks[..., None]
