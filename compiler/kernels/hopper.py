"""What the Mosaic GPU kernels for Hopper (sm_90a) share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SWIZZLE = 128  # bytes: tiles of 8 lines by 128 bytes are what wgmma reads without bank conflicts


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory whose lines are 64 or a multiple of 128 bytes, laid out for wgmma and for bulk copies."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(SWIZZLE, shape[-1] * size)
    lowering: Any = plgpu  # mypy takes the transforms for abstract
    transforms = lowering.TilingTransform((8, swizzle // size)), lowering.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(x: Any, y: Any, columns: int) -> jax.Array:
    """x y for x [rows, depth] and y [depth, columns] in shared memory: float32 [rows, columns], in registers."""

    def multiply(total: Any) -> jax.Array:
        plgpu.wgmma(total, x, y)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((x.shape[0], columns), jnp.float32))
