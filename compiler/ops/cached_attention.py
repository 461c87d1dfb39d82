"""Attention of new tokens over the remembered keys and values of their own rows."""

import jax
import jax.numpy as jnp

from xlathe.op import op
from xlathe.ops.attention import cap_scores


@op("cached_attention")
def cached_attention(
    q: jax.Array,  # [n, k, g, d], one query a token
    keys: jax.Array,  # [r, s, k, d], slot i of a row holds its token at position i
    values: jax.Array,  # [r, s, k, e]
    rows: jax.Array,  # int32 [n]
    positions: jax.Array,  # int32 [n]
    *terms: jax.Array,  # mask bool, bias float; each [k | 1, g | 1, n, s]
    scale: float,
    softcap: float | None,
    window: int | None,
    masked: bool,
    biased: bool,
    scores_dtype: str,
    softmax_dtype: str,
    probs_dtype: str,
    out_dtype: str,
) -> jax.Array:  # [n, k, g, e]
    """What `attention` computes for the token at `positions[i]` of row `rows[i]`, its own key included.

    A query sees the slots 0..position of its row; with `window` w only the last w of them. Other slots are never
    read as numbers: they may hold NaN. Scores are computed against every row and the others are masked.
    """
    r, s = keys.shape[:2]
    distance = positions[:, None, None] - jnp.arange(s)  # [n, 1, s]
    seen = (distance >= 0) & (rows[:, None, None] == jnp.arange(r)[:, None])  # [n, r, s]
    if window is not None:
        seen &= distance < window
    remaining = [term[..., None, :] for term in terms]  # [k | 1, g | 1, n, 1, s]
    keep = seen & remaining.pop(0) if masked else seen[None, None]
    scores = jnp.einsum("nkgd,rskd->kgnrs", q, keys, preferred_element_type=scores_dtype)
    scores = cap_scores(scores.astype(softmax_dtype), scale, softcap)
    if biased:
        scores = scores + remaining.pop(0).astype(softmax_dtype)
    scores = jnp.where(keep, scores, jnp.finfo(scores.dtype).min)
    probs = jax.nn.softmax(scores, axis=(-2, -1)).astype(probs_dtype)
    used = jnp.any(seen, axis=0)[..., None, None]
    return jnp.einsum(
        "kgnrs,rske->nkge", probs, jnp.where(used, values, 0), preferred_element_type=out_dtype
    ).astype(out_dtype)


def write_slots(cache: jax.Array, new: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns cache [r, s, ...] with new [n, ...] at (rows, positions); writes outside the cache are dropped."""
    return cache.at[rows, positions].set(new, mode="drop")
