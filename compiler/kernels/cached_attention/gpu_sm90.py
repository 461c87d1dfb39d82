"""cached_attention on Hopper GPUs: Pallas on Mosaic GPU."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlathe.errors import OptionError
from xlathe.kernels.cached_attention import coverage
from xlathe.kernels.cached_attention.gpu_sm90_blocks import SLOTS, STAGES, Stream, buffers, held_pages, scales_of_rows
from xlathe.kernels.hopper import product, tiled
from xlathe.kernels.online_softmax import LOWEST, Rows, absorb, finish
from xlathe.ops.attention import cap_scores

LINES = 64  # of a tile of scores: what one warp group multiplies at once
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
      keys: bfloat16 or int8 [r, s, k, d]; s is a multiple of 64; paged [p, page, k, d], a page being 8, 16, 32 or 64 m
        slots.
      values: the same [r, s, k, e] or [p, page, k, e]; e is 64 or 128.
      rows: int32 [n].
      positions: int32 [n].
      more: of int8 the scales of keys and of values, float32 [r, s, k] or [p, page, k]; paged the table int32 [r, c].
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
    n, heads, g, d = q.shape
    tokens = 1 if n <= cache.sizes[0] else LINES // g  # tokens of different rows share nothing
    tiles = pl.cdiv(n, tokens)
    padding, unused = tiles * tokens - n, LINES - tokens * g
    rows, positions = (jnp.pad(x, (0, padding), constant_values=-1).reshape(tiles, tokens) for x in (rows, positions))
    reach = coverage.reach(rows, positions, options["window"], cache.sizes, SLOTS)
    # One line a query head, those of a token beside each other.
    places = [jnp.pad(jnp.repeat(x, g, axis=1), [(0, 0), (0, unused)], constant_values=-1) for x in (rows, positions)]
    lines = jnp.pad(q, [(0, padding), *[(0, 0)] * 3]).reshape(tiles, tokens, heads, g, d).transpose(0, 2, 1, 3, 4)
    lines = jnp.pad(lines.reshape(tiles, heads, tokens * g, d), [(0, 0), (0, 0), (0, unused), (0, 0)])
    out = _join(_parts(reach, cache, places, lines, interpret, **options))[:, :, : tokens * g]
    out = out.reshape(tiles, heads, tokens, g, values.shape[3]).transpose(0, 2, 1, 3, 4)
    return out.reshape(tiles * tokens, *out.shape[2:])[:n].astype(options["out_dtype"])


def uncovered(*operands: jax.Array, **options: Any) -> str | None:
    """Says why the kernel does not compute this attention; None where it does."""
    if reason := coverage.uncovered(*operands, head_sizes=(64, 128), dtypes=("bfloat16",), **options):
        return reason
    q, keys = operands[:2]
    if q.shape[2] > LINES:
        return f"expected at most {LINES} heads a key; found {q.shape}"
    size, paged = keys.shape[1], options.get("layout") == "paged"
    if size % SLOTS and not (paged and size % 8 == 0 and SLOTS % size == 0):
        expected = f"a page of 8, 16, 32 or a multiple of {SLOTS} slots" if paged else f"s a multiple of {SLOTS}"
        return f"expected {expected}; found {keys.shape}"
    return None


def _parts(
    reach: coverage.Reach,  # int32 [tiles, r] each
    cache: coverage.Cache,
    places: list[jax.Array],  # rows and positions, int32 [tiles, LINES]
    lines: jax.Array,  # bfloat16 [tiles, k, LINES, d]
    interpret: plgpu.InterpretGPUParams | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    **_: Any,
) -> Rows:  # float32 [splits, tiles, k, LINES, *rest]
    """Returns what each split of the cache knows of the lines."""
    (tiles, heads), d, e = lines.shape[:2], lines.shape[3], cache.values.shape[3]
    blocks = pl.cdiv(cache.sizes[1], SLOTS)
    splits = max(1, min(THREAD_BLOCKS // (heads * tiles), blocks))
    table = held_pages(cache)
    kept = (cache.keys, cache.values, *scales_of_rows(cache, table))
    parts = plgpu.kernel(
        functools.partial(
            _attend, score=functools.partial(cap_scores, scale=scale, softcap=softcap), window=window, blocks=blocks
        ),
        out_type=[jax.ShapeDtypeStruct((splits, tiles, heads, LINES, *rest), jnp.float32) for rest in ((), (), (e,))],
        grid=(heads, splits, tiles),
        grid_names=("head", "split", "tile"),
        scratch_types=[
            [plgpu.SMEM((LINES,), jnp.int32)] * 2,
            tiled((LINES, d), jnp.bfloat16),
            tiled((LINES, SLOTS), jnp.bfloat16),
            [*[plgpu.SMEM((LINES,), jnp.float32)] * 2, tiled((LINES, e), jnp.float32)],
            plgpu.Barrier(num_arrivals=3),
            *buffers(cache),
        ],
        interpret=interpret,
        kernel_name="cached_attention",
    )(reach, table, places, lines, kept)
    return Rows(*parts)


def _join(parts: Rows) -> jax.Array:
    """Joins what splits [splits, ...] know of the same rows into their results."""
    highest = jnp.max(parts.highest, axis=0)
    fade = jnp.exp(parts.highest - highest)
    weighted = jnp.sum(parts.weighted * fade[..., None], axis=0)
    return finish(Rows(highest, jnp.sum(parts.total * fade, axis=0), weighted))


class Tile(NamedTuple):
    """The lines of a thread block, in shared memory.

    places: rows and positions, int32 [LINES]. q: bfloat16 [LINES, d]. probs: bfloat16 [LINES, SLOTS], weights on their
    way to the matrix unit. window: slots that a line sees, None for all.
    """

    places: list[Any]
    q: Any
    probs: Any
    window: int | None

    def sees(self, stream: Stream, row: Any, block: Any, slot_axis: int) -> jax.Array:
        """bool [LINES, SLOTS], or its transpose for slot_axis 0"""
        shape = (LINES, SLOTS) if slot_axis else (SLOTS, LINES)
        row_of, position = (jax.lax.broadcast_in_dim(x[...], shape, (1 - slot_axis,)) for x in self.places)
        slot = stream.positions(row, block, shape, slot_axis)
        keep = (row_of == row) & (slot <= position)
        return keep if self.window is None else keep & (slot > position - self.window)


def _attend(
    reach: coverage.Reach,  # int32 [tiles, r] each
    table: tuple[Any, ...],  # see `Stream`
    places: list[Any],  # rows and positions, int32 [tiles, LINES]
    q: Any,  # bfloat16 [tiles, k, LINES, d]
    kept: tuple[Any, ...],  # see `Stream`
    highest: Any,  # float32 [splits, tiles, k, LINES]
    total: Any,  # float32 [splits, tiles, k, LINES]
    weighted: Any,  # float32 [splits, tiles, k, LINES, e]
    places_here: list[Any],  # see `Tile`
    q_here: Any,  # see `Tile`
    probs: Any,  # see `Tile`
    results: list[Any],  # as `Rows`, float32 [LINES, *rest]
    lines_arrived: Any,  # barrier
    tiles: tuple[Any, ...],  # see `Stream`
    wide: tuple[Any, ...],  # see `Stream`
    arrived: Any,  # see `Stream`
    *,
    score: Callable[[jax.Array], jax.Array],
    window: int | None,
    blocks: int,
) -> None:
    head, split, tile = (jax.lax.axis_index(name) for name in ("head", "split", "tile"))
    stream, lines = Stream(kept, table, tiles, wide, arrived, head), Tile(places_here, q_here, probs, window)
    for source, target in zip(places, places_here, strict=True):
        plgpu.copy_gmem_to_smem(source.at[tile], target, lines_arrived)
    plgpu.copy_gmem_to_smem(q.at[tile, head], q_here, lines_arrived)
    plgpu.barrier_wait(lines_arrived)

    def of_row(entry: Any, state: Rows) -> Rows:
        here = coverage.Reach(*(x[tile, entry] for x in reach))
        # Fixed parts of the cache: a token's sums do not depend on what the other tokens of its tile see.
        share = pl.cdiv(blocks, highest.shape[0])
        begin = jnp.maximum(split * share, here.first)
        end = jnp.minimum(split * share + share, here.stop)
        for stage in range(STAGES):
            pl.when(begin + stage < end)(functools.partial(stream.start, here.row, begin + stage, stage))

        def look(block: Any, state: Rows) -> Rows:
            stage = jax.lax.rem(block - begin, STAGES)
            state = _absorb_block(state, lines, stream, here, block, stage, score)
            plgpu.commit_smem()  # all warps are done with this stage
            pl.when(block + STAGES < end)(functools.partial(stream.start, here.row, block + STAGES, stage))
            return state

        return jax.lax.fori_loop(begin, end, look, state)

    numbers = (jnp.full(LINES, LOWEST, jnp.float32), jnp.zeros(LINES, jnp.float32))
    state = Rows(*numbers, jnp.zeros(results[2].shape, jnp.float32))
    state = jax.lax.fori_loop(0, reach.row.shape[1], of_row, state)
    for result, number in zip(results, state, strict=True):
        result[...] = number
    plgpu.commit_smem()
    for result, target in zip(results, (highest, total, weighted), strict=True):
        plgpu.copy_smem_to_gmem(result, target.at[split, tile, head])
    plgpu.wait_smem_to_gmem(0)


def _absorb_block(
    state: Rows,
    lines: Tile,
    stream: Stream,
    here: coverage.Reach,  # int32, of one row
    block: Any,
    stage: Any,
    score: Callable[[jax.Array], jax.Array],
) -> Rows:
    """Returns the state after a block of slots."""
    keys, values = stream.wait(stage)
    if not stream.wide:
        whole = (here.since <= block * SLOTS) & (block * SLOTS + SLOTS - 1 <= here.until)
        for at in stream.pages(here.row, block):
            whole &= at >= 0
        pl.when(~whole)(lambda: _silence(values, lines.sees(stream, here.row, block, 0)))
    scores = score(stream.scale(product(lines.q, keys.T, SLOTS), 0, stage))
    keep = lines.sees(stream, here.row, block, 1)

    def weigh(weights: jax.Array) -> jax.Array:
        # A slot that no token sees may have a scale of NaN.
        weights = jnp.where(keep, stream.scale(weights, 1, stage), 0.0) if stream.wide else weights
        lines.probs[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        return product(lines.probs, values, values.shape[1])

    return absorb(state, scores, keep, weigh)


def _silence(values: Any, seen: jax.Array) -> None:
    """Slots that no token sees may hold NaN, which a weight of zero would not silence. seen: bool [SLOTS, LINES]"""
    used = jnp.max(seen.astype(jnp.float32), axis=1) > 0
    spread = jax.lax.broadcast_in_dim(used, values.shape, (0,))
    values[...] = jnp.where(spread, values[...], jnp.zeros_like(values[...]))
