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
from xlathe.kernels.cached_attention.tpu_blocks import Stream, slots_of_block
from xlathe.kernels.online_softmax import LOWEST, Rows, absorb, finish
from xlathe.kernels.tiles import round_up
from xlathe.ops.attention import cap_scores

QUERIES = 256  # of a tile of scores: query heads of all tokens that share a key; at most these
PAGE, ENTRIES = 1024, 1 << 17  # slots of a page, and entries of a table, half of scalar memory; at most these


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *more: jax.Array,
    interpret: pltpu.InterpretParams | bool = False,
    **options: Any,
) -> jax.Array:
    """`xlathe.ops.cached_attention`, a tile of tokens by a block of slots of one row at a time.

    A block is read once for all tokens and heads of a tile, while the block before it is computed with; blocks that
    none of its tokens sees are not read. A token that sees no slot, as padding in a row that the cache lacks, gets
    zeros; in the reference body it gets the mean of what the others see. Neither is used.

    Args:
      q: bfloat16 or float32 [n, k, g, d]; d is 64, 128 or 256.
      keys: the same [r, s, k, d]; or int8; paged [p, page, k, d], a page of at most 1024 slots.
      values: the same [r, s, k, e]; or int8; paged [p, page, k, e]; e is 64, 128 or 256.
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
        raise OptionError(f"cached_attention on TPU: {reason}")
    (n, heads, g, d), e, cache = q.shape, values.shape[3], coverage.cache_of(keys, values, *more, **options)
    tokens = min(round_up(n, 16), round_up(max(1, QUERIES // g), 16))
    tiles, slots = pl.cdiv(n, tokens), slots_of_block(cache)
    pad = functools.partial(jnp.pad, pad_width=(0, tiles * tokens - n), constant_values=-1)
    rows, positions = (pad(x).reshape(tiles, tokens) for x in (rows, positions))
    # One line a query head, those of a token beside each other: [tiles, k, tokens * g, d].
    lines = jnp.pad(q, [(0, tiles * tokens - n), *[(0, 0)] * 3]).reshape(tiles, tokens, heads, g, d)
    lines = lines.transpose(0, 2, 1, 3, 4).reshape(tiles, heads, tokens * g, d)
    places = [jnp.repeat(x, g, axis=1) for x in (rows, positions)]
    reach = coverage.reach(rows, positions, options["window"], cache.sizes, slots)
    kept = (cache.keys, cache.values, *cache.scales)
    shapes = ((None, tokens * g, 1), (None, 1, tokens * g))
    down, across = (pl.BlockSpec(shape, lambda i, *_: (i, 0, 0)) for shape in shapes)
    of_lines = [pl.BlockSpec((None, heads, tokens * g, width), lambda i, *_: (i, 0, 0, 0)) for width in (d, e)]
    out = pl.pallas_call(
        functools.partial(_attend, scale=options["scale"], softcap=options["softcap"], window=options["window"]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[[down] * 2, [across] * 2, of_lines[0], tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in kept)],
            out_specs=of_lines[1],
            scratch_shapes=[
                [pltpu.VMEM((heads, tokens * g, width), jnp.float32) for width in (1, 1, e)],
                tuple(pltpu.VMEM((2, slots, *x.shape[2:]), x.dtype) for x in kept),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles, heads, tokens * g, e), options["out_dtype"]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="cached_attention",
    )(reach[:3], cache.table, [x[:, :, None] for x in places], [x[:, None] for x in places], lines, kept)
    by_token = out.reshape(tiles, heads, tokens, g, e).transpose(0, 2, 1, 3, 4)
    return by_token.reshape(tiles * tokens, heads, g, e)[:n]


def uncovered(*operands: jax.Array, **options: Any) -> str | None:
    """Says why the kernel does not compute this attention; None where it does."""
    dtypes = ("bfloat16", "float32")
    if reason := coverage.uncovered(*operands, head_sizes=(64, 128, 256), dtypes=dtypes, **options):
        return reason
    cache = coverage.cache_of(*operands[1:3], *operands[5:], **options)
    for table in cache.table:
        (r, c), page = table.shape, cache.keys.shape[1]
        if r * round_up(c, 128) > ENTRIES or page > PAGE:
            limits = f"a table of at most {ENTRIES} entries, rows padded to 128, and pages of at most {PAGE} slots"
            return f"expected {limits}; found {table.shape} and {page}"
    return None


def _attend(
    entries: tuple[jax.Ref, ...],  # row, first and stop of `Reach`, int32 [tiles, r]
    table: tuple[jax.Ref, ...],  # none; or int32 [r, c]
    down: list[jax.Ref],  # rows and positions, int32 [lines, 1]
    across: list[jax.Ref],  # the same [1, lines]
    q: jax.Ref,  # [k, lines, d]
    kept: tuple[jax.Ref, ...],  # see `Stream`
    out: jax.Ref,  # [k, lines, e]
    state: list[jax.Ref],  # as `Rows`, float32 [k, lines, 1 | 1 | e]
    buffers: tuple[jax.Ref, ...],  # see `Stream`
    arrived: jax.Ref,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    row, first, stop = (x.at[pl.program_id(0)] for x in entries)
    stream = Stream(kept, table, buffers, arrived)
    state[0][...] = jnp.full_like(state[0], LOWEST)
    for sums in state[1:]:
        sums[...] = jnp.zeros_like(sums)

    def seen(places: list[jax.Ref], slots: jax.Array, entry: Any) -> jax.Array:
        """bool [lines, slots] or [slots, lines]"""
        rows, positions = (x[...] for x in places)
        keep = (rows == row[entry]) & (slots <= positions)
        return keep if window is None else keep & (slots > positions - window)

    def look(entry: Any, block: Any, step: Any) -> Any:
        buffer = jax.lax.rem(step, 2)
        last = block + 1 == stop[entry]
        following = jnp.minimum(entry + last, row.shape[0] - 1)
        upcoming = jnp.where(last, first[following], block + 1)

        @pl.when((following > entry) & (upcoming < stop[following]) | ~last)
        def _fetch() -> None:
            stream.start(row[following], upcoming, 1 - buffer)

        stream.wait(row[entry], block, buffer)
        keep = seen(down, stream.positions(row[entry], block, 1), entry)
        factors = [x[buffer].T for x in buffers[2:]]  # of the scores and of the weights, if int8: [k, slots]
        # Slots that no token sees may hold NaN, which a weight of zero would not silence.
        if factors:
            factors[1] = jnp.where(_any(keep, 0), factors[1], 0.0)
        else:
            used = _any(seen(across, stream.positions(row[entry], block, 0), entry), 1)
        for head in range(q.shape[0]):
            key, value = (x[buffer, :, head] for x in buffers[:2])
            of_key, of_value = (x[head : head + 1] for x in factors) if factors else (1.0, 1.0)
            if not factors:
                value = jnp.where(used, value.astype(jnp.float32), 0.0)
            scores = cap_scores(matmul(q[head], key.astype(q.dtype), (1, 1)) * of_key, scale, softcap)
            weigh = functools.partial(_weigh, value.astype(q.dtype), of_value)
            rows = absorb(Rows(*(x[head] for x in state)), scores, keep, weigh)
            for x, number in zip(state, rows, strict=True):
                x[head] = number
        return step + 1

    def of_row(entry: Any, step: Any) -> Any:
        return jax.lax.fori_loop(first[entry], stop[entry], functools.partial(look, entry), step)

    pl.when(first[0] < stop[0])(lambda: stream.start(row[0], first[0], 0))
    jax.lax.fori_loop(0, row.shape[0], of_row, 0)
    for head in range(q.shape[0]):
        out[head] = finish(Rows(*(x[head] for x in state))).astype(out.dtype)


def _any(keep: jax.Array, axis: int) -> jax.Array:
    return jnp.max(keep.astype(jnp.float32), axis=axis, keepdims=True) > 0


def _weigh(values: jax.Array, factor: jax.Array | float, weights: jax.Array) -> jax.Array:
    return matmul((weights * factor).astype(values.dtype), values, (1, 0))
