"""How blocks of slots come from a cache in HBM into VMEM, for `tpu.py` beside this file."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlathe.kernels.cached_attention.coverage import Cache

SLOTS = 256  # of a block, at most, but for pages that are larger
NOWHERE = jnp.iinfo(jnp.int32).max  # a position that no token sees


def slots_of_block(cache: Cache) -> int:
    """Returns how many slots come at once: as many from one place, or whole pages."""
    if not cache.table:
        return min(SLOTS, cache.sizes[1])
    page, pages = cache.keys.shape[1], cache.table[0].shape[1]
    return page * min(max(1, SLOTS // page), pages)


class Stream(NamedTuple):
    """Two buffers in VMEM, and what fills them.

    kept: keys, values and their scales if there are some, [r, s, ...] or [p, page, ...] in HBM. table: none; or int32
    [r, c]. buffers: [2, slots, ...] for each of `kept`. arrived: semaphores [2].
    """

    kept: tuple[Any, ...]
    table: tuple[Any, ...]
    buffers: tuple[Any, ...]
    arrived: Any

    def start(self, row: Any, block: Any, buffer: Any) -> None:
        """Sets out to fill a buffer with a block of a row."""
        self._for_each_copy(row, block, buffer, lambda copy: copy.start())

    def wait(self, row: Any, block: Any, buffer: Any) -> None:
        """Waits for what `start` of the same set out for."""
        self._for_each_copy(row, block, buffer, lambda copy: copy.wait())

    def positions(self, row: Any, block: Any, axis: int) -> jax.Array:
        """Returns whose positions the slots of a block are for, int32 [slots, 1] or [1, slots] for axis 0 and 1."""
        slots = self.buffers[0].shape[1]
        place = jax.lax.broadcasted_iota(jnp.int32, (slots, 1) if axis == 0 else (1, slots), axis)
        if not self.table:
            position = self._begin(block) + place
            return jnp.where(position < block * slots, NOWHERE, position)  # those came with the block before
        page, position = self.kept[0].shape[1], block * slots + place
        for i, (held, _) in enumerate(self._pages(row, block)):
            lost = jnp.where(held, 0, NOWHERE)
            position = jnp.maximum(position, jnp.where(jax.lax.div(place, page) == i, lost, 0))
        return position

    def _for_each_copy(self, row: Any, block: Any, buffer: Any, act: Callable[[Any], None]) -> None:
        def move(source: Callable[[Any], Any], begin: int, size: int) -> None:
            for array, target in zip(self.kept, self.buffers, strict=True):
                here = target.at[buffer, pl.ds(begin, size)]
                act(pltpu.make_async_copy(source(array), here, self.arrived.at[buffer]))

        slots = self.buffers[0].shape[1]
        if not self.table:
            move(lambda array: array.at[row, pl.ds(self._begin(block), slots)], 0, slots)
            return
        size = self.kept[0].shape[1]
        for i, (held, page) in enumerate(self._pages(row, block)):

            @pl.when(held)
            def _of_page(i: int = i, page: Any = page) -> None:
                move(lambda array: array.at[page], i * size, size)

    def _begin(self, block: Any) -> Any:
        """The first slot that comes with a block. The last block is as long as the others."""
        slots = self.buffers[0].shape[1]
        return jnp.minimum(block * slots, self.kept[0].shape[1] - slots)

    def _pages(self, row: Any, block: Any) -> Iterator[tuple[Any, Any]]:
        """Yields for each page of a block whether the pool holds it, and which it is."""
        pages = self.table[0].shape[1]
        each = self.buffers[0].shape[1] // self.kept[0].shape[1]
        for i in range(each):
            entry = block * each + i
            page = self.table[0][row, jnp.minimum(entry, pages - 1)]
            yield (entry < pages) & (page >= 0) & (page < self.kept[0].shape[0]), page
