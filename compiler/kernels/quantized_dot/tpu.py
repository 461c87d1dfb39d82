"""quantized_dot on TPU: Pallas on Mosaic TPU."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlathe.errors import OptionError
from xlathe.kernels.quantized_dot import tpu_int4
from xlathe.kernels.quantized_dot.coverage import group_of, uncovered
from xlathe.kernels.tiles import round_up

ROWS, COLUMNS, DEPTH = 256, 512, 2048  # of a tile of x codes^T: at most these


def quantized_dot(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *zero: jax.Array,
    out_dtype: str,
    format: str,
    activations: str | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """`xlathe.ops.quantized_dot`, whose codes become bfloat16 tile by tile, in VMEM.

    Args:
      x: bfloat16 [..., k].
      codes: int8 [n, k]; or uint8 [n, k / 2], two a byte.
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
        raise OptionError(f"quantized_dot on TPU: {reason}")
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if group := group_of(format):
        y = tpu_int4.product(
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
    interpret: pltpu.InterpretParams | bool,
) -> jax.Array:  # out_dtype [rows, n]
    (n, depth), rows = codes.shape, x.shape[0]
    tile = (min(ROWS, round_up(rows, 16)), min(COLUMNS, round_up(n, 128)), min(DEPTH, round_up(depth, 128)))
    grid = (pl.cdiv(rows, tile[0]), pl.cdiv(n, tile[1]), pl.cdiv(depth, tile[2]))
    # Past the end of the codes a tile holds some integers, which zeros in x make harmless.
    padding = (-rows % tile[0], grid[2] * tile[2] - depth)
    y = pl.pallas_call(
        functools.partial(_accumulate, steps=grid[2]),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile[0], tile[2]), lambda i, j, step: (i, step)),
            pl.BlockSpec((tile[1], tile[2]), lambda i, j, step: (j, step)),
            pl.BlockSpec((1, tile[1]), lambda i, j, step: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile[0], tile[1]), lambda i, j, step: (i, j)),
        out_shape=jax.ShapeDtypeStruct((grid[0] * tile[0], n), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile[0], tile[1]), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="quantized_dot",
    )(jnp.pad(x, [(0, more) for more in padding]), codes, scale[None])
    return y[:rows]


def _accumulate(
    x: jax.Ref,  # bfloat16 [rows, depth]
    codes: jax.Ref,  # int8 [columns, depth]
    scale: jax.Ref,  # float32 [1, columns]
    out: jax.Ref,  # [rows, columns]
    total: jax.Ref,  # float32 [rows, columns]
    *,
    steps: int,
) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        total[...] = jnp.zeros_like(total)

    total[...] += jax.lax.dot_general(
        x[...],
        codes[...].astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == steps - 1)
    def _finish() -> None:
        out[...] = (total[...] * scale[...]).astype(out.dtype)
