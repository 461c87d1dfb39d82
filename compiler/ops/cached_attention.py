"""Attention of new tokens over the remembered keys and values of their own rows."""

import jax
import jax.numpy as jnp

from xlathe.op import op
from xlathe.ops.attention import cap_scores
from xlathe.ops.write_slots import gather_pages, in_a_page


@op("cached_attention")
def cached_attention(
    q: jax.Array,  # [n, k, g, d], one query a token
    keys: jax.Array,  # [r, s, k, d], where tokens lie as `write_slots` says
    values: jax.Array,  # [r, s, k, e]
    rows: jax.Array,  # int32 [n]
    positions: jax.Array,  # int32 [n]
    *more: jax.Array,  # mask, bias; if quantized scales of keys and of values; if paged the table
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
) -> jax.Array:  # [n, k, g, e]
    """What `attention` computes for the token at `positions[i]` of row `rows[i]`, its own key included.

    A query sees the slots of positions 0..position of its row; with `window` w only the last w of them. Other slots are
    never read as numbers: they may hold NaN. Scores are computed against every row and the others are masked.

    Mask is bool and bias float, both [k | 1, g | 1, n, s]. layout: `paged` has keys and values [p, page, k, d | e], a
    table int32 [r, c], and s = c * page; a `ring` has no mask and no bias, and s above the window by the most tokens of
    a row that a call writes, less one. quantized: keys and values are int8 codes with scales float32 [r, s, k] (paged:
    [p, page, k]), which multiply scores and probabilities instead. shared: values are the first so many features of
    keys, as where a latent is both, and the operand `values` is the keys again.
    """
    remaining = list(more)
    mask = remaining.pop(0) if masked else None
    bias = remaining.pop(0) if biased else None
    scales = [remaining.pop(0), remaining.pop(0)] if quantized else []
    held = None
    if layout == "paged":
        (table,) = remaining
        held = in_a_page(keys, table)
        keys, values, *scales = (gather_pages(pool, table) for pool in (keys, values, *scales))
    values = values[..., :shared]
    seen = _seen(rows, positions, keys.shape[:2], window, layout)  # [n, r, s]
    if held is not None:
        seen &= held
    keep = seen[None, None] if mask is None else seen & mask[..., None, :]  # [k | 1, g | 1, n, r, s]
    used = jnp.any(seen, axis=0)[..., None]  # [r, s, 1]
    if quantized:
        scores = jnp.einsum("nkgd,rskd->kgnrs", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
        scores = (scores * _by_head(scales[0])).astype(scores_dtype)
    else:
        scores = jnp.einsum("nkgd,rskd->kgnrs", q, keys, preferred_element_type=scores_dtype)
    scores = cap_scores(scores.astype(softmax_dtype), scale, softcap)
    if bias is not None:
        scores = scores + bias[..., None, :].astype(softmax_dtype)
    scores = jnp.where(keep, scores, jnp.finfo(scores.dtype).min)
    probs = jax.nn.softmax(scores, axis=(-2, -1)).astype(probs_dtype)
    if quantized:
        probs = (probs * _by_head(jnp.where(used, scales[1], 0))).astype(probs_dtype)
        values = values.astype(probs_dtype)
    else:
        values = jnp.where(used[..., None], values, 0)
    return jnp.einsum("kgnrs,rske->nkge", probs, values, preferred_element_type=out_dtype).astype(out_dtype)


def _seen(rows: jax.Array, positions: jax.Array, sizes: tuple[int, ...], window: int | None, layout: str) -> jax.Array:
    """Says which of the r * s slots each token sees, bool [n, r, s].

    A ring's slot i holds the last position up to the token's that is i mod s: later ones that a call wrote as well
    replaced some that lay before the window.
    """
    r, s = sizes
    distance = positions[:, None, None] - jnp.arange(s)  # [n, 1, s]
    if layout == "ring":
        distance = distance % s
        seen = distance <= positions[:, None, None]
    else:
        seen = distance >= 0
    seen = seen & (rows[:, None, None] == jnp.arange(r)[:, None])
    return seen if window is None else seen & (distance < window)


def _by_head(scales: jax.Array) -> jax.Array:
    """Arranges scales [r, s, k] for scores: [k, 1, 1, r, s]."""
    return jnp.moveaxis(scales, -1, 0)[:, None, None]
