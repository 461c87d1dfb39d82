"""quantized_dot on Hopper GPUs: Pallas on Mosaic GPU."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlathe.errors import OptionError
from xlathe.kernels.hopper import tiled
from xlathe.kernels.quantized_dot import coverage, gpu_sm90_int4
from xlathe.kernels.quantized_dot.coverage import group_of
from xlathe.kernels.tiles import round_up

DEPTH = 128  # of a tile: one line of 128 bytes of codes
FEW = 32  # rows up to which reading the weight is what takes time, and more and smaller tiles read it faster


def quantized_dot(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *zero: jax.Array,
    out_dtype: str,
    format: str,
    activations: str | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """`xlathe.ops.quantized_dot`, whose codes become bfloat16 tile by tile, in shared memory.

    It computes codes x^T: wgmma wants 64 rows or more, and a weight always has them.

    Args:
      x: bfloat16 [..., k]; k is a multiple of 128, with 4 bits of 256.
      codes: int8 [n, k]; or uint8 [n, k / 2], two a byte; n is a multiple of 64.
      scale: float32 [n], one a row of codes; or bfloat16 [n, k / group].
      out_dtype: bfloat16 or float32.
      format: the text of one in `coverage.COVERED`. activations: None.
      zero: none; or with 4 bits uint8 [n, k / group].
      interpret: simulate the kernel, for tests.

    Returns:
      out_dtype [..., n]. Products with 8-bit codes are exact, 4-bit weights are rounded to bfloat16; sums are float32.

    Raises:
      OptionError: `uncovered` has a reason.
    """
    if reason := uncovered(x, codes, scale, *zero, out_dtype=out_dtype, format=format, activations=activations):
        raise OptionError(f"quantized_dot on Hopper: {reason}")
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if group := group_of(format):
        y = gpu_sm90_int4.product(
            flat, codes, scale, *zero, group=group, out_dtype=out_dtype, interpret=interpret
        )
    else:
        y = _product(flat, codes, scale, out_dtype, interpret)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def _product(
    x: jax.Array,  # bfloat16 [rows, k]
    codes: jax.Array,  # int8 [n, k]
    scale: jax.Array,  # float32 [n]
    out_dtype: str,
    interpret: plgpu.InterpretGPUParams | None,
) -> jax.Array:  # out_dtype [rows, n]
    (n, depth), rows = codes.shape, x.shape[0]
    tile = min(128, round_up(rows, 8))
    columns = 128 if rows > FEW and n % 128 == 0 else 64
    stages = min(depth // DEPTH, 6 if rows <= FEW else 3)
    y = plgpu.kernel(
        functools.partial(_multiply, steps=depth // DEPTH, stages=stages),
        out_type=jax.ShapeDtypeStruct((n, round_up(rows, tile)), out_dtype),
        grid=(n // columns, pl.cdiv(rows, tile)),
        grid_names=("columns", "rows"),
        scratch_types=[
            tiled((stages, tile, DEPTH), jnp.bfloat16),
            tiled((stages, columns, DEPTH), jnp.int8),
            tiled((columns, DEPTH), jnp.bfloat16),
            plgpu.SMEM((columns,), jnp.float32),
            plgpu.SMEM((columns, tile), out_dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        interpret=interpret,
        kernel_name="quantized_dot",
    )(jnp.pad(x, [(0, -rows % tile), (0, 0)]), codes, scale)
    return y[:, :rows].T


def uncovered(x: jax.Array, *parts: jax.Array, format: str, **options: Any) -> str | None:
    """Says why the kernel does not compute this product; None where it does."""
    if reason := coverage.uncovered(x, *parts, format=format, **options):
        return reason
    (n, width), bits = parts[0].shape, 4 if group_of(format) else 8
    if n % 64 or width % DEPTH:
        return f"expected n a multiple of 64 and k of {DEPTH * 8 // bits}; found {n} and {width * 8 // bits}"
    return None


def _multiply(
    x: Any,  # bfloat16 [rows, k]
    codes: Any,  # int8 [n, k]
    scale: Any,  # float32 [n]
    out: Any,  # [n, rows]
    x_tiles: Any,  # bfloat16 [stages, tile, DEPTH]
    code_tiles: Any,  # int8 [stages, columns, DEPTH]
    weights: Any,  # bfloat16 [columns, DEPTH]
    scales: Any,  # float32 [columns]
    result: Any,  # [columns, tile]
    scales_arrived: Any,  # barrier
    arrived: Any,  # barrier [stages]
    *,
    steps: int,
    stages: int,
) -> None:
    tile, columns = x_tiles.shape[1], code_tiles.shape[1]
    mine = pl.ds(jax.lax.axis_index("columns") * columns, columns)
    lines = pl.ds(jax.lax.axis_index("rows") * tile, tile)

    def fetch(step: Any, stage: Any) -> None:
        part = pl.ds(step * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(x.at[lines, part], x_tiles.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(codes.at[mine, part], code_tiles.at[stage], arrived.at[stage])

    def accumulate(total: Any) -> jax.Array:
        @pl.loop(0, steps)
        def _step(step: Any) -> None:
            stage = jax.lax.rem(step, stages)
            plgpu.barrier_wait(arrived.at[stage])
            weights[...] = code_tiles[stage].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.wgmma(total, weights, x_tiles.at[stage].T)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # all warps are done with this stage

            @pl.when(step + stages < steps)
            def _refill() -> None:
                fetch(step + stages, stage)

        return total[...]

    plgpu.copy_gmem_to_smem(scale.at[mine], scales, scales_arrived)
    for stage in range(stages):
        fetch(stage, stage)
    total = pl.run_scoped(accumulate, plgpu.ACC((columns, tile), jnp.float32))
    plgpu.barrier_wait(scales_arrived)
    result[...] = (total * jax.lax.broadcast_in_dim(scales[...], total.shape, (0,))).astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[mine, lines])
    plgpu.wait_smem_to_gmem(0)
