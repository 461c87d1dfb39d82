"""attention on TPU: Pallas on Mosaic TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlathe.errors import OptionError
from xlathe.kernels.attention import coverage
from xlathe.kernels.online_softmax import LOWEST, Rows, absorb, finish
from xlathe.kernels.tiles import round_up
from xlathe.ops.attention import cap_scores

QUERIES, KEYS = 512, 512  # of a tile of scores: at most these

uncovered = functools.partial(coverage.uncovered, head_sizes=(64, 128, 256), dtypes=("bfloat16", "float32"))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *terms: jax.Array,
    interpret: pltpu.InterpretParams | bool = False,
    **options: Any,
) -> jax.Array:
    """`xlathe.ops.attention`, a tile of queries by keys at a time (Dao et al. 2022).

    Tiles that the mask hides are neither read nor computed. A query that sees no key gets zeros; in the reference body
    it gets the mean of all values. Neither is used.

    Args:
      q: bfloat16 or float32 [b, t, k, g, d]; d is 64, 128 or 256.
      k: the same [b, s, k, d].
      v: the same [b, s, k, e]; e is 64, 128 or 256.
      terms: the mask, bool [b | 1, 1, 1, t | 1, s | 1], where there is one.
      interpret: simulate the kernel, for tests.
      options: the attributes of the operation.

    Returns:
      [b, t, k, g, e] in the operation's `out_dtype`.

    Raises:
      OptionError: `uncovered` has a reason.
    """
    if reason := uncovered(q, k, v, *terms, **options):
        raise OptionError(f"attention on TPU: {reason}")
    (b, t, heads, g, d), (s, e) = q.shape, (k.shape[1], v.shape[3])
    queries, keys = min(QUERIES, round_up(t, 16)), min(KEYS, round_up(s, 128))
    nt, ns = pl.cdiv(t, queries), pl.cdiv(s, keys)
    per_head = jnp.pad(q, [(0, 0), (0, nt * queries - t), *[(0, 0)] * 3]).transpose(0, 2, 3, 1, 4)
    whole = [jnp.pad(x, [(0, 0), (0, ns * keys - s), *[(0, 0)] * 2]).transpose(0, 2, 1, 3) for x in (k, v)]
    masks = [coverage.padded_mask(mask, nt * queries, ns * keys, t, s) for mask in terms]
    blocks = coverage.visible_blocks(masks[0], queries, keys) if masks else coverage.all_blocks(nt, ns)

    def key_block(i: Any, h: Any, j: Any, step: Any, first: Any, stop: Any) -> tuple[Any, ...]:
        return (
            _row(i, first),
            j,
            jnp.minimum(first[_row(i, first), j] + step, jnp.maximum(stop[_row(i, first), j], 1) - 1),
        )

    def of_keys(i: Any, h: Any, *rest: Any) -> tuple[Any, ...]:
        return i, jax.lax.div(h, g), key_block(i, h, *rest)[2], 0

    out = pl.pallas_call(
        functools.partial(_attend, scale=options["scale"], softcap=options["softcap"], s=s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, heads * g, nt, ns),
            in_specs=[
                pl.BlockSpec((None, None, queries, d), lambda i, h, j, *_: (i, h, j, 0)),
                pl.BlockSpec((None, None, keys, d), of_keys),
                pl.BlockSpec((None, None, keys, e), of_keys),
                *(pl.BlockSpec((None, queries, keys), key_block) for _ in masks),
            ],
            out_specs=pl.BlockSpec((None, None, queries, e), lambda i, h, j, *_: (i, h, j, 0)),
            scratch_shapes=[pltpu.VMEM((queries, width), jnp.float32) for width in (1, 1, e)],
        ),
        out_shape=jax.ShapeDtypeStruct((b, heads * g, nt * queries, e), options["out_dtype"]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=interpret,
        name="attention",
    )(*blocks, per_head.reshape(b, heads * g, nt * queries, d), *whole, *masks)
    return out[:, :, :t].reshape(b, heads, g, t, e).transpose(0, 3, 1, 2, 4)


def _row(i: Any, blocks: Any) -> Any:
    """The row of a table that every sequence has, or all share."""
    return i if blocks.shape[0] > 1 else 0


def _attend(
    first: jax.Ref,  # int32 [b | 1, nt]
    stop: jax.Ref,  # int32 [b | 1, nt]
    q: jax.Ref,  # [queries, d]
    k: jax.Ref,  # [keys, d]
    v: jax.Ref,  # [keys, e]
    *others: jax.Ref,  # mask int8 [queries, keys], if there is one; out [queries, e]; and rows in VMEM
    scale: float,
    softcap: float | None,
    s: int,
) -> None:
    *masks, out, highest, total, weighted = others
    i, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[_row(i, first), j] + step

    @pl.when(step == 0)
    def _start() -> None:
        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(block < stop[_row(i, first), j])
    def _look() -> None:
        scores = cap_scores(matmul(q[...], k[...], (1, 1)), scale, softcap)
        keep = None
        if masks:
            keep = masks[0][...].astype(jnp.int32) != 0
        elif s % k.shape[0]:
            keep = block * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < s
        rows = Rows(highest[...], total[...], weighted[...])
        rows = absorb(rows, scores, keep, lambda weights: matmul(weights.astype(v.dtype), v[...], (1, 0)))
        highest[...], total[...], weighted[...] = rows

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish() -> None:
        out[...] = finish(Rows(highest[...], total[...], weighted[...])).astype(out.dtype)


def matmul(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """A product in float32, exact to its last bits in every dtype: float32 operands are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
