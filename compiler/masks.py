"""What a mask lets through, found by evaluating it at every pair of positions."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256  # query positions evaluated at once
MASKED_BELOW = -1e4  # a bias this far below the best of its row leaves probability 0 in float32 beside any real score


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """How the keys that a query sees are found when decoding.

    window: a query sees its last `window` keys; None means all earlier ones. exact: whether that is all the mask
    says; otherwise the author's own mask is computed too. biased: whether a bias remains on keys that are seen.
    """

    window: int | None
    exact: bool
    biased: bool


TermsAt = Callable[[jax.Array, jax.Array], tuple[jax.Array | None, jax.Array | None]]


class NotCausal(Exception):
    """A query sees a later key, or none at all."""


def plan_mask(terms_at: TermsAt, max_len: int) -> MaskPlan:
    """Evaluates mask and bias for all 0 <= q, k < max_len.

    terms_at: maps query positions [Q] and key positions [K] to (mask [..., Q, K], bias [..., Q, K]); either may be
        None. A bias that is not to be read as a mask is not given.
    Raises NotCausal with the first pair in which a query sees a later key, or the first query that sees none: its
    probabilities would be spread over all keys, later ones included.
    """
    keys = jnp.arange(max_len, dtype=jnp.int32)
    last = _allowed(terms_at, jnp.asarray([max_len - 1], jnp.int32), keys)[0]
    by_distance = last.any(axis=0)[0, ::-1]  # [max_len]: distance 0 is the query's own key
    check = jax.jit(lambda start: _check_block(terms_at, start, keys, by_distance))
    exact, biased = True, False
    for start in range(0, max_len, BLOCK):
        future, blind, same, block_biased = (np.asarray(x) for x in check(jnp.asarray(start, jnp.int32)))
        if future.any():
            offset, key = np.argwhere(future)[0]
            raise NotCausal(f"lets the token at position {start + offset} see the later one at {key}")
        if blind.any():
            raise NotCausal(f"lets the token at position {start + int(blind.argmax())} see no key, not even its own")
        exact &= bool(same.all())
        biased |= bool(block_biased)
    window = _window(np.asarray(by_distance))
    return MaskPlan(window if window != max_len else None, exact and window is not None, biased)


def _allowed(terms_at: TermsAt, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns which keys are seen, bool [heads, Q, K], and the bias as [heads, Q, K]."""
    mask, bias = (None if x is None else x.reshape(-1, *x.shape[-2:]) for x in terms_at(queries, keys))
    allowed = jnp.ones((1, queries.shape[0], keys.shape[0]), bool)
    if mask is not None:
        allowed = allowed & mask
    if bias is not None:
        best = jnp.max(bias, axis=-1, keepdims=True, where=allowed, initial=-jnp.inf)
        allowed = allowed & (bias > best + MASKED_BELOW)
    return allowed, bias


def _check_block(
    terms_at: TermsAt, start: jax.Array, keys: jax.Array, by_distance: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    queries = jnp.minimum(start + jnp.arange(min(BLOCK, keys.shape[0]), dtype=jnp.int32), keys.shape[0] - 1)
    allowed, bias = _allowed(terms_at, queries, keys)
    distance = queries[:, None] - keys[None, :]
    future = (allowed & (distance < 0)).any(axis=0)
    expected = jnp.where(distance >= 0, by_distance[jnp.maximum(distance, 0)], False)
    biased = jnp.any(allowed & (bias != 0)) if bias is not None else jnp.asarray(False)
    blind = ~allowed.any(axis=-1).all(axis=0)
    return future, blind, (allowed == expected).all(axis=(1, 2)), biased


def _window(by_distance: np.ndarray) -> int | None:
    """Returns w where exactly the distances below w are seen, else None."""
    width = int(by_distance.sum())
    return width if width and by_distance[:width].all() else None
