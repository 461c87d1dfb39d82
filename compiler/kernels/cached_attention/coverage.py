"""What the Pallas kernels of cached_attention share: what they cover, and which slots a tile of tokens sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """The remembered operands of cached_attention.

    keys, values: [r, s, k, d | e]; paged [p, page, k, d | e]. scales: none; or of keys and of values, which are int8
    codes, float32 [r, s, k] or [p, page, k]. table: none; or int32 [r, c].
    """

    keys: jax.Array
    values: jax.Array
    scales: tuple[jax.Array, ...]
    table: tuple[jax.Array, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows, and slots of one."""
        if not self.table:
            return self.keys.shape[0], self.keys.shape[1]
        rows, pages = self.table[0].shape
        return rows, pages * self.keys.shape[1]


def cache_of(
    keys: jax.Array, values: jax.Array, *more: jax.Array, layout: str = "contiguous", quantized: bool = False, **_: Any
) -> Cache:
    """Returns the cache of operands and attributes that `uncovered` has no objection to."""
    paged, scales = layout == "paged", 2 * quantized
    return Cache(keys, values, more[:scales], more[scales : scales + paged])


def uncovered(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *more: jax.Array,
    head_sizes: tuple[int, ...],
    dtypes: tuple[str, ...],
    scale: float,
    softcap: float | None,
    window: int | None,
    masked: bool,
    biased: bool,
    scores_dtype: str,
    softmax_dtype: str,
    probs_dtype: str,
    out_dtype: str,
    layout: str = "contiguous",
    quantized: bool = False,
    shared: int | None = None,
) -> str | None:
    """Says why no kernel for heads of `head_sizes` in `dtypes` computes `xlathe.ops.cached_attention` of this; or None.

    Dtypes as in `xlathe.kernels.attention.coverage`.
    """
    if masked or biased or len(more) != 2 * quantized + (layout == "paged"):
        return "expected no mask beside the window, and no bias"
    if shared is not None:
        return "expected values of their own; found some that are part of the keys"
    if layout == "ring":
        return "expected a contiguous or a paged cache; found a ring"
    cache = cache_of(keys, values, *more, layout=layout, quantized=quantized)
    if reason := _other_shapes(q, cache, rows, positions):
        return reason
    if not {q.shape[3], values.shape[3]} <= set(head_sizes):
        sizes = " or ".join(map(str, head_sizes))
        return f"expected heads of {sizes} features; found {q.shape[3]} and {values.shape[3]}"
    if quantized and not keys.dtype == values.dtype == "int8":
        return f"expected codes int8 where there are scales; found {_texts(keys, values)}"
    kept = set() if quantized else {str(array.dtype) for array in (keys, values)}
    wide, narrow = {"float32", str(q.dtype)}, {str(q.dtype), probs_dtype} | kept
    if not (narrow == {str(q.dtype)} <= set(dtypes) and {scores_dtype, softmax_dtype, out_dtype} <= wide):
        stages = ", ".join(sorted(narrow | {scores_dtype, softmax_dtype, out_dtype}))
        either = " or ".join(dtypes)
        return f"expected q, the cache and probabilities in {either}, the rest as they or float32; found {stages}"
    return None


def _other_shapes(q: jax.Array, cache: Cache, rows: jax.Array, positions: jax.Array) -> str | None:
    """Says which operands have not the shapes of the operation; None where all have."""
    keys, values = cache.keys, cache.values
    first = "p, page" if cache.table else "r, s"
    if q.ndim != 4 or keys.ndim != 4 or keys.shape[2:] != (q.shape[1], q.shape[3]):
        return f"expected q [n, k, g, d] and keys [{first}, k, d]; found {q.shape} and {keys.shape}"
    if values.ndim != 4 or values.shape[:3] != keys.shape[:3]:
        return f"expected keys [{first}, k, d] and values [{first}, k, e]; found {keys.shape} and {values.shape}"
    if any(x.shape != q.shape[:1] or x.dtype != "int32" for x in (rows, positions)):
        return f"expected rows and positions int32 [n]; found {_texts(rows, positions)}"
    if any(x.shape != keys.shape[:3] or x.dtype != "float32" for x in cache.scales):
        return f"expected scales float32 [{first}, k]; found {_texts(*cache.scales)}"
    if any(x.ndim != 2 or x.dtype != "int32" for x in cache.table):
        return f"expected a table int32 [r, c]; found {_texts(*cache.table)}"
    if not all(array.size for array in (q, keys, values, *cache.table)):
        return f"expected no axis to be empty; found {_texts(q, keys, values, *cache.table)}"
    return None


def _texts(*arrays: jax.Array) -> str:
    return ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)


class Reach(NamedTuple):
    """The blocks of slots that each tile of tokens has to look at; each int32 [tiles, r].

    Entry i of a tile is its i-th row of the cache: blocks `first` up to `stop` of row `row`. A tile of tokens of fewer
    rows than r repeats its last entry, empty, so that a pipeline which follows the entries fetches nothing new. The
    tile's last token of the row sees all slots from `since` to `until`. Entries that are not empty come first.
    """

    row: jax.Array
    first: jax.Array
    stop: jax.Array
    since: jax.Array
    until: jax.Array


def reach(
    rows: jax.Array,  # int32 [tiles, tokens], outside 0..r for none
    positions: jax.Array,  # int32 [tiles, tokens]
    window: int | None,
    cache: tuple[int, int],  # r, s
    block: int,  # slots
) -> Reach:
    """Returns what tiles of tokens reach of a cache."""
    r, s = cache
    blocks = -(-s // block)
    mine = (rows[:, :, None] == jnp.arange(r)) & (positions[:, :, None] >= 0)  # [tiles, tokens, r]
    last = jnp.minimum(positions, s - 1)[:, :, None] // block
    since = jnp.zeros_like(positions) if window is None else jnp.clip(positions - (window - 1), 0, s)
    stop = jnp.max(jnp.where(mine, last + 1, 0), axis=1)
    seen = jnp.any(mine, axis=1)  # [tiles, r]
    first = jnp.min(jnp.where(mine, since[:, :, None] // block, blocks), axis=1)
    first = jnp.minimum(first, stop - seen)  # a row of the tile has a block, even if a token lies far behind its end
    order = jnp.argsort(~seen, axis=1, stable=True)
    count = jnp.sum(seen, axis=1, keepdims=True)
    entry = jnp.take_along_axis(order, jnp.clip(count - 1, 0, jnp.arange(r)[None]), axis=1)
    until = jnp.max(jnp.where(mine, positions[:, :, None], -1), axis=1)
    begin = jnp.zeros_like(until) if window is None else jnp.maximum(until - (window - 1), 0)
    first, stop, begin, until = (jnp.take_along_axis(x, entry, axis=1) for x in (first, stop, begin, until))
    empty = jnp.arange(r) >= count
    return Reach(*(x.astype(jnp.int32) for x in (entry, jnp.where(empty, stop, first), stop, begin, until)))
