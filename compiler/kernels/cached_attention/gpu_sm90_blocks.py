"""How blocks of slots come from a cache into shared memory, for `gpu_sm90.py` beside this file."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlathe.kernels.cached_attention.coverage import Cache
from xlathe.kernels.hopper import tiled

SLOTS = 64  # of a block
STAGES = 2  # blocks of keys and values on their way
NOWHERE = jnp.iinfo(jnp.int32).max  # a position that no token sees


class Stream(NamedTuple):
    """Stages in shared memory, and what fills them with blocks of slots of one head.

    kept: keys and values, bfloat16 or int8 [r, s, k, d | e] or [p, page, k, d | e], and of int8 their scales, float32
    [r, k, s] whatever the layout. table: none; or int32 [r, c], -1 for no page. tiles: for each of `kept` the stages,
    [STAGES, SLOTS, d | e] and [STAGES, SLOTS]. wide: none; or of int8 the codes of one stage, bfloat16 [SLOTS, d | e].
    arrived: barriers [STAGES]. head: whose keys and values come.
    """

    kept: tuple[Any, ...]
    table: tuple[Any, ...]
    tiles: tuple[Any, ...]
    wide: tuple[Any, ...]
    arrived: Any
    head: Any

    def start(self, row: Any, block: Any, stage: Any) -> None:
        """Sets out to fill a stage with a block of a row."""
        page, size = self._part, self.kept[0].shape[1]
        outer = [jnp.maximum(x, 0) for x in self.pages(row, block)] if self.table else [row]
        begin = jax.lax.rem(block * SLOTS, size) if self.table and page == SLOTS else block * SLOTS
        for i, at in enumerate(outer):
            part = pl.ds(begin, SLOTS) if page == SLOTS else pl.ds(0, page)
            for source, target in zip(self.kept[:2], self.tiles[:2], strict=True):
                here = target.at[stage, pl.ds(i * page, page)]
                plgpu.copy_gmem_to_smem(source.at[at, part, self.head], here, self.arrived.at[stage])
        for source, target in zip(self.kept[2:], self.tiles[2:], strict=True):
            scales = source.at[row, self.head, pl.ds(block * SLOTS, SLOTS)]
            plgpu.copy_gmem_to_smem(scales, target.at[stage], self.arrived.at[stage])

    def wait(self, stage: Any) -> tuple[Any, ...]:
        """Waits for what `start` set out for; returns keys and values, bfloat16 [SLOTS, d | e] in shared memory."""
        plgpu.barrier_wait(self.arrived.at[stage])
        if not self.wide:
            return tuple(tile.at[stage] for tile in self.tiles)
        for codes, numbers in zip(self.tiles[:2], self.wide, strict=True):
            numbers[...] = codes[stage].astype(numbers.dtype)
        plgpu.commit_smem()
        return self.wide

    def scale(self, numbers: jax.Array, kind: int, stage: Any) -> jax.Array:
        """Multiplies float32 [lines, SLOTS] by the scales of keys (0) or of values (1), if there are some."""
        if not self.wide:
            return numbers
        scales = self.tiles[2 + kind].at[stage]
        return numbers * jax.lax.broadcast_in_dim(scales[...], numbers.shape, (1,))

    def pages(self, row: Any, block: Any) -> list[Any]:
        """Of a paged cache: where the parts of a block lie in the pool, below 0 for nowhere."""
        size = self.kept[0].shape[1]
        begin = [jax.lax.div(block * SLOTS + slot, size) for slot in range(0, SLOTS, self._part)]
        return [table[row, i] for table in self.table for i in begin]

    def positions(self, row: Any, block: Any, shape: tuple[int, int], axis: int) -> jax.Array:
        """Returns whose positions the slots of a block are for, int32 in a shape with the slots at `axis`."""
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        position = block * SLOTS + place
        for i, at in enumerate(self.pages(row, block)):
            lost = jnp.where(at < 0, NOWHERE, 0)
            position = jnp.maximum(position, jnp.where(jax.lax.div(place, self._part) == i, lost, 0))
        return position

    @property
    def _part(self) -> int:
        """Slots of a block that lie beside each other."""
        return min(self.kept[0].shape[1], SLOTS) if self.table else SLOTS


def buffers(cache: Cache) -> list[Any]:
    """Returns the shared memory of a `Stream`: its tiles, what is wide, and its barriers."""
    sizes = [array.shape[3] for array in (cache.keys, cache.values)]
    codes = [tiled((STAGES, SLOTS, size), cache.keys.dtype) for size in sizes]
    scales = [plgpu.SMEM((STAGES, SLOTS), jnp.float32) for _ in cache.scales]
    wide = [tiled((SLOTS, size), jnp.bfloat16) for size in sizes] if scales else []
    parts = max(1, SLOTS // cache.keys.shape[1]) if cache.table else 1
    arrived = plgpu.Barrier(num_arrivals=2 * parts + len(scales), num_barriers=STAGES)
    return [tuple(codes + scales), tuple(wide), arrived]


def held_pages(cache: Cache) -> tuple[jax.Array, ...]:
    """Returns the table, if there is one, with an entry for every page of the blocks; -1 for what the pool lacks."""
    (pool, page), more = cache.keys.shape[:2], -cache.sizes[1] % SLOTS
    whole = [jnp.pad(table, [(0, 0), (0, pl.cdiv(more, page))], constant_values=-1) for table in cache.table]
    return tuple(jnp.where((table >= 0) & (table < pool), table, -1) for table in whole)


def scales_of_rows(cache: Cache, table: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns the scales as float32 [r, k, s]: those of a block then lie beside each other, as bulk copies need them.

    Beside the codes they are little, so that XLA may gather and turn them around in every layout.
    """
    rows = cache.scales
    for pages in table:
        rows = tuple(scales[jnp.maximum(pages, 0)].reshape(len(pages), -1, scales.shape[2]) for scales in rows)
    return tuple(scales.transpose(0, 2, 1) for scales in rows)
