"""Products with 4-bit weights on Hopper GPUs, for `gpu_sm90.py` beside this file."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlathe.kernels.hopper import tiled
from xlathe.kernels.quantized_dot.coverage import MIDDLE
from xlathe.kernels.tiles import round_up

COLUMNS, WIDTH = 64, 128  # of a tile: rows of codes, and bytes of one, with two codes each
FEW = 32  # rows of x up to which reading the weight is what takes time


def product(
    x: jax.Array,  # bfloat16 [rows, k]; k is a multiple of 256
    codes: jax.Array,  # uint8 [n, k / 2]; n is a multiple of 64
    scale: jax.Array,  # bfloat16 [n, k / group]
    *zero: jax.Array,  # uint8 [n, k / group], or none
    group: int,
    out_dtype: str,
    interpret: plgpu.InterpretGPUParams | None,
) -> jax.Array:  # out_dtype [rows, n]
    """x w^T, where the weight w becomes bfloat16 tile by tile, in shared memory.

    The two codes of a byte stay apart, as low and high halves of the weight's columns; x is put into that order
    instead, for it is small. Scales are turned around, so that those of a group lie beside each other: a loop over
    tokens does that once.
    """
    (n, width), rows = codes.shape, x.shape[0]
    tile, steps = min(128, round_up(rows, 8)), width // WIDTH
    stages, groups = min(steps, 6 if rows <= FEW else 2), max(1, 2 * WIDTH // group)
    halves = jnp.pad(x, [(0, -rows % tile), (0, 0)]).reshape(-1, width, 2).transpose(2, 0, 1)
    y = plgpu.kernel(
        functools.partial(_multiply, steps=steps, half=group // 2),
        out_type=jax.ShapeDtypeStruct((n, halves.shape[1]), out_dtype),
        grid=(n // COLUMNS, halves.shape[1] // tile),
        grid_names=("columns", "rows"),
        scratch_types=[
            tiled((stages, 2, tile, WIDTH), jnp.bfloat16),
            tiled((stages, COLUMNS, WIDTH), jnp.uint8),
            plgpu.SMEM((stages, groups, COLUMNS), jnp.bfloat16),
            *(plgpu.SMEM((stages, groups, COLUMNS), jnp.uint8) for _ in zero),
            tiled((2, COLUMNS, WIDTH), jnp.bfloat16),
            plgpu.SMEM((COLUMNS, tile), out_dtype),
            plgpu.Barrier(num_arrivals=3 + len(zero), num_barriers=stages),
        ],
        interpret=interpret,
        kernel_name="quantized_dot_int4",
    )(halves, codes, scale.T, *(z.T for z in zero))
    return y[:, :rows].T


def _multiply(
    x: Any,  # bfloat16 [2, rows, k / 2]
    codes: Any,  # uint8 [n, k / 2]
    scale: Any,  # bfloat16 [k / group, n]
    *others: Any,  # zero uint8 [k / group, n], if there is one; out [n, rows]; and what follows, in shared memory
    steps: int,
    half: int,
) -> None:
    zero = others[: (len(others) - 7) // 2]
    # x [stages, 2, tile, WIDTH]; codes [stages, COLUMNS, WIDTH]; scale and zero [stages, groups, COLUMNS];
    # weights [2, COLUMNS, WIDTH]; result [COLUMNS, tile]
    out, x_tiles, code_tiles, scales, *zeros, weights, result, arrived = others[len(zero) :]
    stages, _, tile, _ = x_tiles.shape
    mine = pl.ds(jax.lax.axis_index("columns") * COLUMNS, COLUMNS)
    lines = pl.ds(jax.lax.axis_index("rows") * tile, tile)

    def fetch(step: Any, stage: Any) -> None:
        part = pl.ds(step * WIDTH, WIDTH)
        groups = pl.ds(jax.lax.div(step * WIDTH, half), scales.shape[1])
        plgpu.copy_gmem_to_smem(x.at[:, lines, part], x_tiles.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(codes.at[mine, part], code_tiles.at[stage], arrived.at[stage])
        for source, target in zip((scale, *zero), (scales, *zeros), strict=True):
            plgpu.copy_gmem_to_smem(source.at[groups, mine], target.at[stage], arrived.at[stage])

    def accumulate(total: Any) -> jax.Array:
        @pl.loop(0, steps)
        def _step(step: Any) -> None:
            stage = jax.lax.rem(step, stages)
            plgpu.barrier_wait(arrived.at[stage])
            pairs, factor = code_tiles[stage].astype(jnp.uint16), _spread(scales.at[stage], half)
            middle = (_spread(zeros[0].at[stage], half) if zeros else MIDDLE) + 128
            for side, code in enumerate((pairs & 15, pairs >> 4)):
                # The bits of 128 with those of a code are 128 + code; conversions take an instruction for each code.
                above = jax.lax.bitcast_convert_type(code | 0x4300, jnp.bfloat16)
                # Differences have 5 bits and are exact; products are rounded once, as those of float32 would be.
                weights[side] = (above - middle) * factor
            plgpu.commit_smem()
            for side in range(2):
                plgpu.wgmma(total, weights.at[side], x_tiles.at[stage, side].T)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # all warps are done with this stage
            pl.when(step + stages < steps)(functools.partial(fetch, step + stages, stage))

        return total[...]

    for stage in range(stages):
        fetch(stage, stage)
    result[...] = pl.run_scoped(accumulate, plgpu.ACC((COLUMNS, tile), jnp.float32)).astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[mine, lines])
    plgpu.wait_smem_to_gmem(0)


def _spread(of_groups: Any, half: int) -> jax.Array:
    """What belongs to the group of each byte: bfloat16 [COLUMNS, WIDTH], of [groups, COLUMNS]."""
    shape = (COLUMNS, min(half, WIDTH))
    parts = [
        jax.lax.broadcast_in_dim(of_groups[i].astype(jnp.bfloat16), shape, (0,)) for i in range(of_groups.shape[0])
    ]
    return jnp.concatenate(parts, axis=1)
