"""cached_attention on Hopper GPUs: Pallas on Mosaic GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlathe.errors import OptionError
from xlathe.kernels.cached_attention import coverage
from xlathe.kernels.hopper import product, tiled
from xlathe.kernels.online_softmax import LOWEST, Rows, absorb, finish
from xlathe.ops.attention import cap_scores

LINES, SLOTS = 64, 64  # of a tile of scores: what one warp group multiplies at once
STAGES = 2  # blocks of keys and values on their way
THREAD_BLOCKS = 264  # to fill a chip: two for each of 132 multiprocessors


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    **options: Any,
) -> jax.Array:
    """`xlathe.ops.cached_attention`, a tile of tokens by a block of slots of one row at a time.

    What a tile reads is split over several thread blocks where there are few tiles (flash decoding, Dao et al. 2023);
    blocks of slots that none of its tokens sees are not read. A token that sees no slot, as padding in a row that the
    cache lacks, gets zeros; in the reference body it gets the mean of what the others see. Neither is used.

    Args:
      q: bfloat16 [n, k, g, d]; g is at most 64, d is 64 or 128.
      keys: bfloat16 [r, s, k, d]; s is a multiple of 64.
      values: bfloat16 [r, s, k, e]; e is 64 or 128.
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
        raise OptionError(f"cached_attention on Hopper: {reason}")
    (n, heads, g, d), (r, s), e = q.shape, keys.shape[:2], values.shape[3]
    tokens = 1 if n <= r else LINES // g  # tokens of different rows share nothing
    tiles = pl.cdiv(n, tokens)
    splits = max(1, min(THREAD_BLOCKS // (heads * tiles), s // SLOTS))
    more, unused = tiles * tokens - n, LINES - tokens * g
    rows, positions = (jnp.pad(x, (0, more), constant_values=-1).reshape(tiles, tokens) for x in (rows, positions))
    table = coverage.reach(rows, positions, options["window"], (r, s), SLOTS)
    # One line a query head, those of a token beside each other.
    places = [jnp.pad(jnp.repeat(x, g, axis=1), [(0, 0), (0, unused)], constant_values=-1) for x in (rows, positions)]
    lines = jnp.pad(q, [(0, more), *[(0, 0)] * 3]).reshape(tiles, tokens, heads, g, d).transpose(0, 2, 1, 3, 4)
    lines = jnp.pad(lines.reshape(tiles, heads, tokens * g, d), [(0, 0), (0, 0), (0, unused), (0, 0)])
    parts = plgpu.kernel(
        functools.partial(
            _attend, scale=options["scale"], softcap=options["softcap"], window=options["window"], splits=splits
        ),
        out_type=[jax.ShapeDtypeStruct((splits, tiles, heads, LINES, *rest), jnp.float32) for rest in ((), (), (e,))],
        grid=(heads, splits, tiles),
        grid_names=("head", "split", "tile"),
        scratch_types=[
            plgpu.SMEM((LINES,), jnp.int32),
            plgpu.SMEM((LINES,), jnp.int32),
            tiled((LINES, d), jnp.bfloat16),
            tiled((STAGES, SLOTS, d), jnp.bfloat16),
            tiled((STAGES, SLOTS, e), jnp.bfloat16),
            tiled((LINES, SLOTS), jnp.bfloat16),
            plgpu.SMEM((LINES,), jnp.float32),
            plgpu.SMEM((LINES,), jnp.float32),
            tiled((LINES, e), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        interpret=interpret,
        kernel_name="cached_attention",
    )(*table, *places, lines, keys, values)
    out = _join(Rows(*parts))[:, :, : tokens * g].reshape(tiles, heads, tokens, g, e).transpose(0, 2, 1, 3, 4)
    return out.reshape(tiles * tokens, heads, g, e)[:n].astype(options["out_dtype"])


def uncovered(*operands: jax.Array, **options: Any) -> str | None:
    """Says why the kernel does not compute this attention; None where it does."""
    if reason := coverage.uncovered(*operands, head_sizes=(64, 128), dtypes=("bfloat16",), **options):
        return reason
    q, keys = operands[:2]
    if q.shape[2] > LINES or keys.shape[1] % SLOTS:
        return f"expected at most {LINES} heads a key and s a multiple of {SLOTS}; found {q.shape} and {keys.shape}"
    return None


def _join(parts: Rows) -> jax.Array:
    """Joins what splits [splits, ...] know of the same rows into their results."""
    highest = jnp.max(parts.highest, axis=0)
    fade = jnp.exp(parts.highest - highest)
    weighted = jnp.sum(parts.weighted * fade[..., None], axis=0)
    return finish(Rows(highest, jnp.sum(parts.total * fade, axis=0), weighted))


def _attend(
    row: Any,  # int32 [tiles, r]
    first: Any,  # int32 [tiles, r]
    stop: Any,  # int32 [tiles, r]
    since: Any,  # int32 [tiles, r]
    until: Any,  # int32 [tiles, r]
    rows: Any,  # int32 [tiles, LINES]
    positions: Any,  # int32 [tiles, LINES]
    q: Any,  # bfloat16 [tiles, k, LINES, d]
    keys: Any,  # bfloat16 [r, s, k, d]
    values: Any,  # bfloat16 [r, s, k, e]
    highest: Any,  # float32 [splits, tiles, k, LINES]
    total: Any,  # float32 [splits, tiles, k, LINES]
    weighted: Any,  # float32 [splits, tiles, k, LINES, e]
    rows_here: Any,  # int32 [LINES]
    positions_here: Any,  # int32 [LINES]
    q_tile: Any,  # bfloat16 [LINES, d]
    key_tiles: Any,  # bfloat16 [STAGES, SLOTS, d]
    value_tiles: Any,  # bfloat16 [STAGES, SLOTS, e]
    probs: Any,  # bfloat16 [LINES, SLOTS]
    *others: Any,  # highest, total [LINES] and weighted [LINES, e], float32; barriers of the lines and [STAGES]
    scale: float,
    softcap: float | None,
    window: int | None,
    splits: int,
) -> None:
    *results, lines_arrived, arrived = others
    head, split, tile = (jax.lax.axis_index(name) for name in ("head", "split", "tile"))

    def fetch(entry: Any, block: Any, stage: Any) -> None:
        part = pl.ds(block * SLOTS, SLOTS)
        plgpu.copy_gmem_to_smem(keys.at[row[tile, entry], part, head], key_tiles.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(values.at[row[tile, entry], part, head], value_tiles.at[stage], arrived.at[stage])

    def seen(entry: Any, block: Any, slot_axis: int) -> jax.Array:
        """bool [LINES, SLOTS], or its transpose for slot_axis 0."""
        shape = (LINES, SLOTS) if slot_axis else (SLOTS, LINES)
        here = (rows_here[...], positions_here[...])
        row_of, position = (jax.lax.broadcast_in_dim(x, shape, (1 - slot_axis,)) for x in here)
        slot = block * SLOTS + jax.lax.broadcasted_iota(jnp.int32, shape, slot_axis)
        keep = (row_of == row[tile, entry]) & (slot <= position)
        return keep if window is None else keep & (slot > position - window)

    def silence(entry: Any, block: Any, stage: Any) -> None:
        """Slots that no token sees may hold NaN, which a weight of zero would not silence."""
        used = jnp.max(seen(entry, block, 0).astype(jnp.float32), axis=1) > 0
        tile_of = value_tiles.at[stage]
        spread = jax.lax.broadcast_in_dim(used, tile_of.shape, (0,))
        tile_of[...] = jnp.where(spread, tile_of[...], jnp.zeros_like(tile_of[...]))

    def look(entry: Any, begin: Any, end: Any, block: Any, state: Rows) -> Rows:
        stage = jax.lax.rem(block - begin, STAGES)
        plgpu.barrier_wait(arrived.at[stage])
        whole = (since[tile, entry] <= block * SLOTS) & (block * SLOTS + SLOTS - 1 <= until[tile, entry])
        pl.when(~whole)(functools.partial(silence, entry, block, stage))
        scores = cap_scores(product(q_tile, key_tiles.at[stage].T, SLOTS), scale, softcap)

        def weigh(weights: jax.Array) -> jax.Array:
            probs[...] = weights.astype(jnp.bfloat16)
            plgpu.commit_smem()
            return product(probs, value_tiles.at[stage], value_tiles.shape[2])

        state = absorb(state, scores, seen(entry, block, 1), weigh)
        plgpu.commit_smem()  # all warps are done with this stage
        pl.when(block + STAGES < end)(functools.partial(fetch, entry, block + STAGES, stage))
        return state

    def of_row(entry: Any, state: Rows) -> Rows:
        # Fixed parts of the cache: a token's sums do not depend on what the other tokens of its tile see.
        share = pl.cdiv(keys.shape[1] // SLOTS, splits)
        begin = jnp.maximum(split * share, first[tile, entry])
        end = jnp.minimum(split * share + share, stop[tile, entry])
        for stage in range(STAGES):
            pl.when(begin + stage < end)(functools.partial(fetch, entry, begin + stage, stage))
        return jax.lax.fori_loop(begin, end, functools.partial(look, entry, begin, end), state)

    plgpu.copy_gmem_to_smem(rows.at[tile], rows_here, lines_arrived)
    plgpu.copy_gmem_to_smem(positions.at[tile], positions_here, lines_arrived)
    plgpu.copy_gmem_to_smem(q.at[tile, head], q_tile, lines_arrived)
    plgpu.barrier_wait(lines_arrived)
    numbers = (jnp.full(LINES, LOWEST, jnp.float32), jnp.zeros(LINES, jnp.float32))
    state = Rows(*numbers, jnp.zeros(results[2].shape, jnp.float32))
    state = jax.lax.fori_loop(0, row.shape[1], of_row, state)
    for result, number in zip(results, state, strict=True):
        result[...] = number
    plgpu.commit_smem()
    for result, target in zip(results, (highest, total, weighted), strict=True):
        plgpu.copy_smem_to_gmem(result, target.at[split, tile, head])
    plgpu.wait_smem_to_gmem(0)
