"""Products with 4-bit weights on TPU, for `tpu.py` beside this file."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlathe.kernels.quantized_dot.coverage import MIDDLE
from xlathe.kernels.tiles import round_up

ROWS, COLUMNS, WIDTH = 256, 512, 1024  # of a tile: rows of x, rows of codes and bytes of one; at most these
LANES = 128  # of a register, and so of the scales that a step has at hand


def product(
    x: jax.Array,  # bfloat16 [rows, k]
    codes: jax.Array,  # uint8 [n, k / 2]
    scale: jax.Array,  # bfloat16 [n, k / group]
    *zero: jax.Array,  # uint8 [n, k / group], or none
    group: int,
    out_dtype: str,
    interpret: pltpu.InterpretParams | bool,
) -> jax.Array:  # out_dtype [rows, n]
    """x w^T, where the weight w becomes bfloat16 tile by tile, in VMEM.

    The two codes of a byte stay apart: all low halves of a tile, then all high ones. x is put into that order instead,
    for it is small.
    """
    (n, width), rows, half = codes.shape, x.shape[0], group // 2
    tile = (min(ROWS, round_up(rows, 16)), min(COLUMNS, round_up(n, 128)), min(WIDTH, round_up(width, LANES)))
    grid = (pl.cdiv(rows, tile[0]), pl.cdiv(n, tile[1]), pl.cdiv(width, tile[2]))
    share = tile[2] // half  # groups of a step
    scales = pl.BlockSpec((tile[1], LANES), lambda i, j, step: (j, jax.lax.div(step, LANES // share)))
    y = pl.pallas_call(
        functools.partial(_accumulate, half=half, groups=scale.shape[1]),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile[0], 2 * tile[2]), lambda i, j, step: (i, step)),
            pl.BlockSpec((tile[1], tile[2]), lambda i, j, step: (j, step)),
            *(scales for _ in (scale, *zero)),
        ],
        out_specs=pl.BlockSpec((tile[0], tile[1]), lambda i, j, step: (i, j)),
        out_shape=jax.ShapeDtypeStruct((grid[0] * tile[0], n), out_dtype),
        scratch_shapes=[
            pltpu.VMEM((tile[0], tile[1]), jnp.float32),
            pltpu.VMEM((tile[1], 2 * tile[2]), jnp.bfloat16),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="quantized_dot_int4",
    )(_halves_apart(x, grid[0] * tile[0], tile[2], grid[2]), codes, scale, *zero)
    return y[:rows]


def _halves_apart(x: jax.Array, rows: int, width: int, steps: int) -> jax.Array:
    """Returns x, padded with zeros to [rows, steps * 2 * width]: in each step even columns, then odd ones."""
    padded = jnp.pad(x, [(0, rows - x.shape[0]), (0, steps * 2 * width - x.shape[1])])
    return padded.reshape(rows, steps, width, 2).swapaxes(2, 3).reshape(padded.shape)


def _accumulate(
    x: jax.Ref,  # bfloat16 [rows, 2 * width]
    codes: jax.Ref,  # uint8 [columns, width]
    scale: jax.Ref,  # bfloat16 [columns, LANES]
    *others: jax.Ref,  # zero uint8 [columns, LANES], if there is one; out [rows, columns]; and what follows
    half: int,
    groups: int,
) -> None:
    *zero, out, total, weights = others  # total float32 [rows, columns], weights bfloat16 [columns, 2 * width]
    step, (columns, width) = pl.program_id(2), codes.shape

    @pl.when(step == 0)
    def _start() -> None:
        total[...] = jnp.zeros_like(total)

    lane = jax.lax.broadcasted_iota(jnp.int32, (columns, LANES), 1)
    block, part = jax.lax.div(step, LANES * half // width), jax.lax.rem(step, LANES * half // width)
    # Past the end of the codes there are some integers, which zeros in x make harmless; scales could be NaN.
    scales = jnp.where(block * LANES + lane < groups, scale[...].astype(jnp.float32), 0.0)
    zeros = [z[...].astype(jnp.int32) for z in zero]
    for begin in range(0, width, LANES):
        group = part * (width // half) + jax.lax.div(begin + lane, half)
        bytes_here = codes[:, begin : begin + LANES].astype(jnp.int32)
        middle = _pick(zeros[0], group) if zeros else MIDDLE
        for at, code in ((begin, bytes_here & 15), (width + begin, bytes_here >> 4)):
            weight = (code - middle).astype(jnp.float32) * _pick(scales, group)
            weights[:, at : at + LANES] = weight.astype(jnp.bfloat16)
    total[...] += jax.lax.dot_general(
        x[...], weights[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        out[...] = total[...].astype(out.dtype)


def _pick(of_groups: jax.Array, group: Any) -> jax.Array:
    """Returns what belongs to the group of each lane: a permutation of lanes, which the chip has."""
    return jnp.take_along_axis(of_groups, group, axis=1, mode="promise_in_bounds")
