"""cached_attention on TPU: Pallas on Mosaic TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlathe.errors import OptionError
from xlathe.kernels.attention.tpu import matmul
from xlathe.kernels.cached_attention import coverage
from xlathe.kernels.online_softmax import LOWEST, Rows, absorb, finish
from xlathe.kernels.tiles import round_up
from xlathe.ops.attention import cap_scores

QUERIES, SLOTS = 256, 256  # of a tile of scores: query heads of all tokens that share a key, and slots; at most these

uncovered = functools.partial(coverage.uncovered, head_sizes=(64, 128, 256), dtypes=("bfloat16", "float32"))


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *,
    interpret: pltpu.InterpretParams | bool = False,
    **options: Any,
) -> jax.Array:
    """`xlathe.ops.cached_attention`, a tile of tokens by a block of slots of one row at a time.

    A block is read once for all tokens and heads of a tile; blocks that none of its tokens sees are not read. A token
    that sees no slot, as padding in a row that the cache lacks, gets zeros; in the reference body it gets the mean of
    what the others see. Neither is used.

    Args:
      q: bfloat16 or float32 [n, k, g, d]; d is 64, 128 or 256.
      keys: the same [r, s, k, d].
      values: the same [r, s, k, e]; e is 64, 128 or 256.
      rows: int32 [n].
      positions: int32 [n].
      interpret: simulate the kernel, for tests.
      options: the attributes of the operation.

    Returns:
      [n, k, g, e] in the operation's `out_dtype`.

    Raises:
      OptionError: `uncovered` has a reason.
    """
    if reason := uncovered(q, keys, values, rows, positions, **options):
        raise OptionError(f"cached_attention on TPU: {reason}")
    (n, heads, g, d), (r, s), e = q.shape, keys.shape[:2], values.shape[3]
    tokens = min(round_up(n, 16), round_up(max(1, QUERIES // g), 16))
    tiles, slots = pl.cdiv(n, tokens), min(SLOTS, round_up(s, 16))
    more = tiles * tokens - n
    rows, positions = (jnp.pad(x, (0, more), constant_values=-1).reshape(tiles, tokens) for x in (rows, positions))
    # One line a query head, those of a token beside each other: [tiles, k, tokens * g, d].
    lines = jnp.pad(q, [(0, more), *[(0, 0)] * 3]).reshape(tiles, tokens, heads, g, d)
    lines = lines.transpose(0, 2, 1, 3, 4).reshape(tiles, heads, tokens * g, d)
    places = [jnp.repeat(x, g, axis=1) for x in (rows, positions)]
    table = coverage.reach(rows, positions, options["window"], (r, s), slots)
    entries = (table.row, table.first, table.stop)

    def of_tile(i: Any, *_: Any) -> tuple[Any, ...]:
        return i, 0, 0

    def of_slots(i: Any, entry: Any, step: Any, row: Any, first: Any, stop: Any) -> tuple[Any, ...]:
        return row[i, entry], jnp.minimum(first[i, entry] + step, jnp.maximum(stop[i, entry], 1) - 1), 0, 0

    out = pl.pallas_call(
        functools.partial(_attend, scale=options["scale"], softcap=options["softcap"], window=options["window"], s=s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles, r, pl.cdiv(s, slots)),
            in_specs=[
                *[pl.BlockSpec((None, tokens * g, 1), of_tile)] * 2,
                *[pl.BlockSpec((None, 1, tokens * g), of_tile)] * 2,
                pl.BlockSpec((None, heads, tokens * g, d), lambda i, *_: (i, 0, 0, 0)),
                pl.BlockSpec((None, slots, heads, d), of_slots),
                pl.BlockSpec((None, slots, heads, e), of_slots),
            ],
            out_specs=pl.BlockSpec((None, heads, tokens * g, e), lambda i, *_: (i, 0, 0, 0)),
            scratch_shapes=[pltpu.VMEM((heads, tokens * g, width), jnp.float32) for width in (1, 1, e)],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles, heads, tokens * g, e), options["out_dtype"]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="cached_attention",
    )(*entries, *(x[:, :, None] for x in places), *(x[:, None] for x in places), lines, keys, values)
    by_token = out.reshape(tiles, heads, tokens, g, e).transpose(0, 2, 1, 3, 4)
    return by_token.reshape(tiles * tokens, heads, g, e)[:n]


def _attend(
    row: jax.Ref,  # int32 [tiles, r]
    first: jax.Ref,  # int32 [tiles, r]
    stop: jax.Ref,  # int32 [tiles, r]
    rows_down: jax.Ref,  # int32 [lines, 1]
    positions_down: jax.Ref,  # int32 [lines, 1]
    rows_across: jax.Ref,  # int32 [1, lines]
    positions_across: jax.Ref,  # int32 [1, lines]
    q: jax.Ref,  # [k, lines, d]
    keys: jax.Ref,  # [slots, k, d]
    values: jax.Ref,  # [slots, k, e]
    out: jax.Ref,  # [k, lines, e]
    highest: jax.Ref,  # float32 [k, lines, 1]
    total: jax.Ref,  # float32 [k, lines, 1]
    weighted: jax.Ref,  # float32 [k, lines, e]
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    s: int,
) -> None:
    i, entry, step = (pl.program_id(axis) for axis in range(3))
    block, slots, lines = first[i, entry] + step, keys.shape[0], q.shape[1]

    @pl.when((entry == 0) & (step == 0))
    def _start() -> None:
        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def seen(rows: jax.Array, positions: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        slot = block * slots + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        keep = (rows == row[i, entry]) & (slot <= positions) & (slot < s)
        return keep if window is None else keep & (slot > positions - window)

    @pl.when(block < stop[i, entry])
    def _look() -> None:
        keep = seen(rows_down[...], positions_down[...], (lines, slots), 1)
        by_slot = seen(rows_across[...], positions_across[...], (slots, lines), 0)
        # Slots that no token sees may hold NaN, which a weight of zero would not silence.
        used = jnp.max(by_slot.astype(jnp.float32), axis=1, keepdims=True) > 0  # [slots, 1]
        for head in range(q.shape[0]):
            value = jnp.where(used, values[:, head].astype(jnp.float32), 0.0).astype(values.dtype)
            scores = cap_scores(matmul(q[head], keys[:, head], (1, 1)), scale, softcap)
            rows = Rows(highest[head], total[head], weighted[head])
            rows = absorb(rows, scores, keep, functools.partial(_weigh, value))
            highest[head], total[head], weighted[head] = rows

    @pl.when((entry == pl.num_programs(1) - 1) & (step == pl.num_programs(2) - 1))
    def _finish() -> None:
        for head in range(q.shape[0]):
            out[head] = finish(Rows(highest[head], total[head], weighted[head])).astype(out.dtype)


def _weigh(values: jax.Array, weights: jax.Array) -> jax.Array:
    return matmul(weights.astype(values.dtype), values, (1, 0))
