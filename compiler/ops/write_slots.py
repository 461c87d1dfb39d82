"""Put new tokens where later ones find them: in the cache, one array [r, s, ...] a remembered value.

Three layouts. `contiguous`: the token at position p of a row lies in slot p. `ring`: in slot p mod s, where the token
at p - s lay, for attention that looks no further back. `paged` (Kwon et al. 2023): the cache is a pool [p, page, ...],
and entry i of a row's table says which page of the pool holds the row's slots from i * page on; an entry that is no
page of the pool stands for slots that are not in use.
"""

import jax
import jax.numpy as jnp

from xlathe.op import op

_NOWHERE = jnp.iinfo(jnp.int32).max
_LARGEST = 127  # code of the largest magnitude of a head


@op("write_slots")
def write_slots(
    cache: jax.Array,  # [r, s, ...]; paged [p, page, ...]
    new: jax.Array,  # [n, ...]
    rows: jax.Array,  # int32 [n]
    positions: jax.Array,  # int32 [n]
    *table: jax.Array,  # int32 [r, c], where paged
    layout: str = "contiguous",
) -> jax.Array:  # as cache
    """Returns the cache with `new[i]` at `positions[i]` of row `rows[i]`; writes outside the cache are dropped."""
    if layout == "paged":
        size = cache.shape[1]
        entry = table[0].at[rows, positions // size].get(mode="fill", fill_value=-1)
        rows, positions = jnp.where(entry < 0, _NOWHERE, entry), positions % size
    elif layout == "ring":
        positions = positions % cache.shape[1]
    return cache.at[rows, positions].set(new, mode="drop")


def gather_pages(pool: jax.Array, table: jax.Array) -> jax.Array:
    """Returns the slots of each row, [r, c * page, ...]; unused pages hold numbers of other pages."""
    pages = pool.at[table].get(mode="clip")  # [r, c, page, ...]
    return pages.reshape(table.shape[0], table.shape[1] * pool.shape[1], *pool.shape[2:])


def in_a_page(pool: jax.Array, table: jax.Array) -> jax.Array:
    """Says which slots of each row lie in a page of the pool, bool [r, c * page]."""
    (r, c), page = table.shape, pool.shape[1]
    used = (table >= 0) & (table < pool.shape[0])
    return jnp.broadcast_to(used[:, :, None], (r, c, page)).reshape(r, c * page)


def quantize_heads(new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds [n, k, d] to codes int8 [n, k, d] and one scale a head, float32 [n, k]: codes * scale is near it.

    The largest magnitude of a head becomes 127; ties go to even.
    """
    wide = new.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1) / _LARGEST
    codes = jnp.round(wide / jnp.where(scale > 0, scale, jnp.ones_like(scale))[..., None])
    return codes.astype(jnp.int8), scale
