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
NOWHERE = jnp.iinfo(jnp.int32).max  # a position that no token sees
THREAD_BLOCKS = 264  # to fill a chip: two for each of 132 multiprocessors


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *more: jax.Array,
    interpret: plgpu.InterpretGPUParams | None = None,
    **options: Any,
) -> jax.Array:
    """`xlathe.ops.cached_attention`, a tile of tokens by a block of slots of one row at a time.

    What a tile reads is split over several thread blocks where there are few tiles (flash decoding, Dao et al. 2023);
    blocks of slots that none of its tokens sees are not read. A token that sees no slot, as padding in a row that the
    cache lacks, gets zeros; in the reference body it gets the mean of what the others see. Neither is used.

    Args:
      q: bfloat16 [n, k, g, d]; g is at most 64, d is 64 or 128.
      keys: bfloat16 [r, s, k, d]; s is a multiple of 64; paged [p, page, k, d], a page being 8, 16, 32 or 64 m slots.
      values: bfloat16 [r, s, k, e] or [p, page, k, e]; e is 64 or 128.
      rows: int32 [n].
      positions: int32 [n].
      more: the table int32 [r, c], if the cache is paged.
      interpret: simulate the kernel, for tests.
      options: the attributes of the operation.

    Returns:
      [n, k, g, e] in the operation's `out_dtype`.

    Raises:
      OptionError: `uncovered` has a reason.
    """
    if reason := uncovered(q, keys, values, rows, positions, *more, **options):
        raise OptionError(f"cached_attention on Hopper: {reason}")
    cache = coverage.cache_of(keys, values, *more, **options)
    (n, heads, g, d), (r, s), e = q.shape, cache.sizes, values.shape[3]
    tokens = 1 if n <= r else LINES // g  # tokens of different rows share nothing
    tiles = pl.cdiv(n, tokens)
    blocks = pl.cdiv(s, SLOTS)
    splits = max(1, min(THREAD_BLOCKS // (heads * tiles), blocks))
    padding, unused = tiles * tokens - n, LINES - tokens * g
    rows, positions = (jnp.pad(x, (0, padding), constant_values=-1).reshape(tiles, tokens) for x in (rows, positions))
    reach = coverage.reach(rows, positions, options["window"], (r, s), SLOTS)
    # One line a query head, those of a token beside each other.
    places = [jnp.pad(jnp.repeat(x, g, axis=1), [(0, 0), (0, unused)], constant_values=-1) for x in (rows, positions)]
    lines = jnp.pad(q, [(0, padding), *[(0, 0)] * 3]).reshape(tiles, tokens, heads, g, d).transpose(0, 2, 1, 3, 4)
    lines = jnp.pad(lines.reshape(tiles, heads, tokens * g, d), [(0, 0), (0, 0), (0, unused), (0, 0)])
    parts = plgpu.kernel(
        functools.partial(
            _attend,
            scale=options["scale"],
            softcap=options["softcap"],
            window=options["window"],
            blocks=blocks,
            splits=splits,
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
            plgpu.Barrier(num_arrivals=2 * (max(1, SLOTS // keys.shape[1]) if cache.table else 1), num_barriers=STAGES),
        ],
        interpret=interpret,
        kernel_name="cached_attention",
    )(reach, _held_pages(cache, blocks), places, lines, keys, values)
    out = _join(Rows(*parts))[:, :, : tokens * g].reshape(tiles, heads, tokens, g, e).transpose(0, 2, 1, 3, 4)
    return out.reshape(tiles * tokens, heads, g, e)[:n].astype(options["out_dtype"])


def uncovered(*operands: jax.Array, **options: Any) -> str | None:
    """Says why the kernel does not compute this attention; None where it does."""
    if reason := coverage.uncovered(*operands, head_sizes=(64, 128), dtypes=("bfloat16",), **options):
        return reason
    q, keys = operands[:2]
    if options.get("quantized"):
        return "expected a cache of floats; found int8"
    if q.shape[2] > LINES:
        return f"expected at most {LINES} heads a key; found {q.shape}"
    size, paged = keys.shape[1], options.get("layout") == "paged"
    if size % SLOTS and not (paged and size % 8 == 0 and SLOTS % size == 0):
        expected = f"a page of 8, 16, 32 or a multiple of {SLOTS} slots" if paged else f"s a multiple of {SLOTS}"
        return f"expected {expected}; found {keys.shape}"
    return None


def _held_pages(cache: coverage.Cache, blocks: int) -> tuple[jax.Array, ...]:
    """Returns the table, if there is one, with an entry for every page of the blocks; -1 for what the pool lacks."""
    (pool, page), more = cache.keys.shape[:2], blocks * SLOTS - cache.sizes[1]
    whole = [jnp.pad(table, [(0, 0), (0, pl.cdiv(more, page))], constant_values=-1) for table in cache.table]
    return tuple(jnp.where((table >= 0) & (table < pool), table, -1) for table in whole)


def _join(parts: Rows) -> jax.Array:
    """Joins what splits [splits, ...] know of the same rows into their results."""
    highest = jnp.max(parts.highest, axis=0)
    fade = jnp.exp(parts.highest - highest)
    weighted = jnp.sum(parts.weighted * fade[..., None], axis=0)
    return finish(Rows(highest, jnp.sum(parts.total * fade, axis=0), weighted))


def _attend(
    reach: coverage.Reach,  # int32 [tiles, r] each
    table: tuple[Any, ...],  # none; or int32 [r, c], -1 for no page
    places: list[Any],  # rows and positions, int32 [tiles, LINES]
    q: Any,  # bfloat16 [tiles, k, LINES, d]
    keys: Any,  # bfloat16 [r, s, k, d]; paged [p, page, k, d]
    values: Any,  # bfloat16 [r, s, k, e]; paged [p, page, k, e]
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
    blocks: int,
    splits: int,
) -> None:
    *results, lines_arrived, arrived = others
    head, split, tile = (jax.lax.axis_index(name) for name in ("head", "split", "tile"))
    row, first, stop, since, until = reach
    page = min(keys.shape[1], SLOTS) if table else SLOTS  # of a block: slots that lie beside each other

    def pages(entry: Any, block: Any) -> list[Any]:
        """Of a paged cache: where the parts of a block lie in the pool, below 0 for nowhere."""
        begin = [jax.lax.div(block * SLOTS + slot, keys.shape[1]) for slot in range(0, SLOTS, page)]
        return [table[0][row[tile, entry], i] for i in begin]

    def fetch(entry: Any, block: Any, stage: Any) -> None:
        outer = [jnp.maximum(x, 0) for x in pages(entry, block)] if table else [row[tile, entry]]
        begin = jax.lax.rem(block * SLOTS, keys.shape[1]) if table and page == SLOTS else block * SLOTS
        for i, at in enumerate(outer):
            part = pl.ds(begin, SLOTS) if page == SLOTS else pl.ds(0, page)
            for source, target in ((keys, key_tiles), (values, value_tiles)):
                here = target.at[stage, pl.ds(i * page, page)]
                plgpu.copy_gmem_to_smem(source.at[at, part, head], here, arrived.at[stage])

    def seen(entry: Any, block: Any, slot_axis: int) -> jax.Array:
        """bool [LINES, SLOTS], or its transpose for slot_axis 0."""
        shape = (LINES, SLOTS) if slot_axis else (SLOTS, LINES)
        here = (rows_here[...], positions_here[...])
        row_of, position = (jax.lax.broadcast_in_dim(x, shape, (1 - slot_axis,)) for x in here)
        place = jax.lax.broadcasted_iota(jnp.int32, shape, slot_axis)
        slot = block * SLOTS + place
        for i, at in enumerate(pages(entry, block) if table else ()):
            lost = jnp.where(at < 0, NOWHERE, 0)
            slot = jnp.maximum(slot, jnp.where(jax.lax.div(place, page) == i, lost, 0))
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
        for at in pages(entry, block) if table else ():
            whole &= at >= 0
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
        share = pl.cdiv(blocks, splits)
        begin = jnp.maximum(split * share, first[tile, entry])
        end = jnp.minimum(split * share + share, stop[tile, entry])
        for stage in range(STAGES):
            pl.when(begin + stage < end)(functools.partial(fetch, entry, begin + stage, stage))
        return jax.lax.fori_loop(begin, end, functools.partial(look, entry, begin, end), state)

    for source, target in zip(places, (rows_here, positions_here), strict=True):
        plgpu.copy_gmem_to_smem(source.at[tile], target, lines_arrived)
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
