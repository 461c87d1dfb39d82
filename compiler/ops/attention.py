"""Attention over a whole sequence, with grouped query heads."""

import jax
import jax.numpy as jnp

from xlathe.op import op


@op("attention")
def attention(
    q: jax.Array,  # [b, t, k, g, d]
    k: jax.Array,  # [b, s, k, d]
    v: jax.Array,  # [b, s, k, e]
    *terms: jax.Array,  # mask bool, bias float; each [b | 1, k | 1, g | 1, t | 1, s | 1]
    scale: float,
    softcap: float | None,
    masked: bool,
    biased: bool,
    scores_dtype: str,
    softmax_dtype: str,
    probs_dtype: str,
    out_dtype: str,
) -> jax.Array:  # [b, t, k, g, e]
    """softmax(softcap(q k^T * scale) + bias, where mask) v (Vaswani et al. 2017; grouped: Ainslie et al. 2023).

    k: key-value heads, g: query heads that share one; s = t keys. `softcap(x) = c tanh(x / c)` (Gemma 2). Scores
    are accumulated in `scores_dtype`, scaled and normalized in `softmax_dtype`, rounded to `probs_dtype` and
    multiplied with values into `out_dtype`.
    """
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=scores_dtype)
    scores = cap_scores(scores.astype(softmax_dtype), scale, softcap)
    remaining = list(terms)
    mask = remaining.pop(0) if masked else None
    if biased:
        scores = scores + remaining.pop(0).astype(softmax_dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(probs_dtype)
    return jnp.einsum("bkgts,bske->btkge", probs, v, preferred_element_type=out_dtype).astype(out_dtype)


def cap_scores(scores: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Scales scores and bounds them softly to (-softcap, softcap)."""
    scores = scores * jnp.asarray(scale, scores.dtype)
    return scores if softcap is None else jnp.tanh(scores / softcap) * softcap
