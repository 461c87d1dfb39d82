"""What the Pallas kernels of cached_attention share: what they cover, and which slots a tile of tokens sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def uncovered(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *terms: jax.Array,
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
) -> str | None:
    """Says why no kernel for heads of `head_sizes` in `dtypes` computes `xlathe.ops.cached_attention` of this; or None.

    Dtypes as in `xlathe.kernels.attention.coverage`.
    """
    if q.ndim != 4 or keys.ndim != 4 or keys.shape[2:] != (q.shape[1], q.shape[3]):
        return f"expected q [n, k, g, d] and keys [r, s, k, d]; found {q.shape} and {keys.shape}"
    if values.ndim != 4 or values.shape[:3] != keys.shape[:3]:
        return f"expected keys [r, s, k, d] and values [r, s, k, e]; found {keys.shape} and {values.shape}"
    if not (q.size and keys.size and values.size):
        return f"expected no axis to be empty; found q {q.shape}, keys {keys.shape}, values {values.shape}"
    if any(x.shape != q.shape[:1] or x.dtype != "int32" for x in (rows, positions)):
        found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in (rows, positions))
        return f"expected rows and positions int32 [n]; found {found}"
    if not {q.shape[3], values.shape[3]} <= set(head_sizes):
        sizes = " or ".join(map(str, head_sizes))
        return f"expected heads of {sizes} features; found {q.shape[3]} and {values.shape[3]}"
    if masked or biased or terms:
        return "expected no mask beside the window, and no bias"
    wide, narrow = {"float32", str(q.dtype)}, {str(array.dtype) for array in (q, keys, values)} | {probs_dtype}
    if not (narrow == {str(q.dtype)} <= set(dtypes) and {scores_dtype, softmax_dtype, out_dtype} <= wide):
        stages = ", ".join(sorted(narrow | {scores_dtype, softmax_dtype, out_dtype}))
        kept = " or ".join(dtypes)
        return f"expected q, the cache and probabilities in {kept}, the rest as they or float32; found {stages}"
    return None


class Reach(NamedTuple):
    """The blocks of slots that each tile of tokens has to look at; each int32 [tiles, r].

    Entry i of a tile is its i-th row of the cache: blocks `first` up to `stop` of row `row`. A tile of tokens of fewer
    rows than r repeats its last entry, empty, so that a pipeline which follows the entries fetches nothing new. The
    tile's last token of the row sees all slots from `since` to `until`.
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
    first = jnp.minimum(jnp.min(jnp.where(mine, since[:, :, None] // block, blocks), axis=1), stop)
    seen = jnp.any(mine, axis=1)  # [tiles, r]
    order = jnp.argsort(~seen, axis=1, stable=True)
    count = jnp.sum(seen, axis=1, keepdims=True)
    entry = jnp.take_along_axis(order, jnp.clip(count - 1, 0, jnp.arange(r)[None]), axis=1)
    until = jnp.max(jnp.where(mine, positions[:, :, None], -1), axis=1)
    begin = jnp.zeros_like(until) if window is None else jnp.maximum(until - (window - 1), 0)
    first, stop, begin, until = (jnp.take_along_axis(x, entry, axis=1) for x in (first, stop, begin, until))
    empty = jnp.arange(r) >= count
    return Reach(*(x.astype(jnp.int32) for x in (entry, jnp.where(empty, stop, first), stop, begin, until)))
