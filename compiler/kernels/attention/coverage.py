"""What the Pallas kernels of attention have in common: what they cover, and which blocks of keys a block sees."""

import jax
import jax.numpy as jnp


def uncovered(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *terms: jax.Array,
    head_sizes: tuple[int, ...],
    dtypes: tuple[str, ...],
    scale: float,
    softcap: float | None,
    masked: bool,
    biased: bool,
    scores_dtype: str,
    softmax_dtype: str,
    probs_dtype: str,
    out_dtype: str,
) -> str | None:
    """Says why no kernel for heads of `head_sizes` in `dtypes` computes `xlathe.ops.attention` of this; or None.

    The kernels keep scores and the softmax in float32, also where the operation would round them to the dtype of its
    operands, and round probabilities to that dtype, as it does.
    """
    if q.ndim != 5 or k.ndim != 4 or k.shape[:1] + k.shape[2:] != (q.shape[0], q.shape[2], q.shape[4]):
        return f"expected q [b, t, k, g, d] and k [b, s, k, d]; found {q.shape} and {k.shape}"
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        return f"expected k [b, s, k, d] and v [b, s, k, e]; found {k.shape} and {v.shape}"
    if not (q.size and k.size and v.size):
        return f"expected no axis to be empty; found q {q.shape}, k {k.shape}, v {v.shape}"
    if not {q.shape[4], v.shape[3]} <= set(head_sizes):
        return f"expected heads of {_either(head_sizes)} features; found {q.shape[4]} and {v.shape[3]}"
    if biased:
        return "expected no bias"
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    if len(terms) != masked or any(not _fits(mask, (b, 1, 1, t, s)) for mask in terms):
        shapes = ", ".join(f"{mask.dtype}{list(mask.shape)}" for mask in terms) or "none"
        return f"expected a mask bool [b | 1, 1, 1, t | 1, s | 1] if masked; found {shapes}"
    wide, narrow = {"float32", str(q.dtype)}, {str(array.dtype) for array in (q, k, v)} | {probs_dtype}
    if not (narrow == {str(q.dtype)} <= set(dtypes) and {scores_dtype, softmax_dtype, out_dtype} <= wide):
        stages = ", ".join(sorted(narrow | {scores_dtype, softmax_dtype, out_dtype}))
        return f"expected q, k, v and probabilities in {_either(dtypes)}, the rest as they or float32; found {stages}"
    return None


def _fits(mask: jax.Array, shape: tuple[int, ...]) -> bool:
    return (
        mask.dtype == "bool"
        and mask.ndim == len(shape)
        and all(size in (1, full) for size, full in zip(mask.shape, shape, strict=True))
    )


def _either(choices: tuple[object, ...]) -> str:
    return " or ".join(map(str, choices))


def padded_mask(mask: jax.Array, queries: int, keys: int, t: int, s: int) -> jax.Array:
    """Returns a mask [b | 1, 1, 1, t | 1, s | 1] as int8 [b | 1, queries, keys], padded with what sees nothing."""
    whole = jnp.broadcast_to(mask[:, 0, 0], (mask.shape[0], t, s)).astype(jnp.int8)
    return jnp.pad(whole, [(0, 0), (0, queries - t), (0, keys - s)])


def visible_blocks(mask: jax.Array, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Returns which blocks of keys each block of queries has to look at: from the first up to the stop.

    For a causal mask these are the blocks up to the diagonal and for a window those beside it; a mask of any other form
    may have blocks in between that the mask hides as a whole, and those cost time only.

    mask: int8 [b, nt * queries, ns * keys]. Returns first and stop, int32 [b, nt], both 0 where nothing is seen.
    """
    b, t, s = mask.shape
    any_seen = jnp.any(mask.reshape(b, t // queries, queries, s // keys, keys) != 0, axis=(2, 4))
    first = jnp.argmax(any_seen, axis=2)
    stop = jnp.where(jnp.any(any_seen, axis=2), s // keys - jnp.argmax(any_seen[..., ::-1], axis=2), 0)
    return first.astype(jnp.int32), stop.astype(jnp.int32)


def all_blocks(tiles: int, blocks: int) -> tuple[jax.Array, jax.Array]:
    """Returns what `visible_blocks` does where every query sees every key."""
    return jnp.zeros((1, tiles), jnp.int32), jnp.full((1, tiles), blocks, jnp.int32)
