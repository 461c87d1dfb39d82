"""Where top-k and top-p cut a row of scores, exactly and without sorting it.

A score is a log probability relative to the likeliest token: 0 for that token, less for the others, -inf
for those that cannot be drawn. The cut is found among the largest scores, the head, if they hold it, else
by bisection on the bits of the float among all. Probability mass is summed in integers, where order does
not matter: so the two ways agree, in any batch, to the last bit.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax


def cut(scores: Array, top_k: Array, top_p: Array) -> Array:
    """Returns float32 [R, 1]: the smallest score that top-k, then top-p, keeps; -inf where both are off.

    Top-k keeps what is not below the k-th largest score. Top-p keeps the smallest set of largest scores
    that has the share p of the mass which top-k left; the token that crosses p belongs to it. Both keep
    what ties with their last.

    scores: float32 [R, V], at most 0. top_k: int32 [R]; off at 0, and from V up. top_p: float32 [R], positive; off from
    1 up.
    """
    vocab = scores.shape[1]
    k = jnp.where(top_k < vocab, top_k, 0)[:, None]
    p = top_p[:, None]
    nothing = jnp.full_like(p, -jnp.inf)

    def search() -> Array:
        # XLA:CPU sorts the whole vocabulary for a top-k of which a static slice is taken.
        head = lax.top_k(scores, head_size(vocab))[0]
        kth = lax.cond((k > 0).any(), lambda: _kth_largest(scores, head, k), lambda: nothing)
        return lax.cond((p < 1).any(), lambda: _nucleus(scores, head, kth, p), lambda: kth)

    return lax.cond(((k > 0) | (p < 1)).any(), search, lambda: nothing)


def head_size(vocab: int) -> int:
    """Returns how many of the largest scores are tried before all are: they rarely fail to hold the cut."""
    return min(max(128, vocab // 128), vocab)


def _kth_largest(scores: Array, head: Array, k: Array) -> Array:
    """Returns float32 [R, 1], -inf where k is 0."""

    def pick() -> Array:
        return jnp.where(jnp.arange(1, head.shape[1] + 1) == k, head, -jnp.inf).max(-1, keepdims=True)

    def search() -> Array:
        found = _largest(lambda threshold: (scores >= threshold).sum(-1, keepdims=True) >= k, k.shape)
        return jnp.where(k > 0, found, -jnp.inf)

    return lax.cond((k <= head.shape[1]).all(), pick, search)


def _nucleus(scores: Array, head: Array, kth: Array, p: Array) -> Array:
    """Returns float32 [R, 1]: the smallest score in the nucleus of those >= `kth`; `kth` where p is 1."""

    def mass(values: Array) -> Callable[[Array], Array]:
        return mass_from(values, jnp.exp(values), scores.shape[1])

    def search(values: Array) -> Array:
        mass_of_values = mass(values)
        return _largest(lambda threshold: mass_of_values(threshold) >= goal, p.shape)

    goal = p * mass(scores)(kth)
    in_head = (mass(head)(kth) >= goal) | (p >= 1)
    found = lax.cond(in_head.all(), lambda: search(head), lambda: search(scores))
    return jnp.where(p < 1, found, kth)


def _largest(reaches: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """Returns the largest threshold <= 0 that satisfies `reaches`, which holds below every threshold it holds
    at; -inf if there is none.

    Read as integers, the bits of floats without a sign are in the order of the floats: so the threshold's
    magnitude is bisected as an integer between 0 and infinity.
    """

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        above, reached = bracket
        middle = above + (reached - above) // 2
        holds = reaches(_threshold(middle))
        return jnp.where(holds, above, middle), jnp.where(holds, middle, reached)

    infinity = lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    bracket = jnp.full(shape, -1, jnp.int32), jnp.full(shape, infinity)
    return _threshold(lax.fori_loop(0, 31, halve, bracket)[1])


def _threshold(magnitude: Array) -> Array:
    return -lax.bitcast_convert_type(magnitude, jnp.float32)


def mass_from(values: Array, weights: Array, vocab: int) -> Callable[[Array], Array]:
    """Returns the function from a threshold [R, 1] to the summed weights of values >= it, float32 [R, 1].

    Weights are cut into integers of so few bits that `vocab` of them sum without overflow. Such a sum is
    exact, so it is the same in every order and never falls when a weight joins. What a weight has beyond
    its last integer is dropped: less than 2^-18 for a whole row.

    values: float32 [R, n]. weights: float32 [R, n] in [0, 1]. vocab: at least n.
    """
    bits = 32 - vocab.bit_length()
    limbs = []
    for _ in range(-(-(vocab.bit_length() + 18) // bits)):
        whole = jnp.floor(weights * 2.0**bits)
        weights = weights * 2.0**bits - whole
        limbs.append(whole.astype(jnp.uint32))

    def mass(threshold: Array) -> Array:
        total = jnp.zeros_like(threshold)
        for limb in reversed(limbs):
            part = jnp.where(values >= threshold, limb, 0).sum(-1, keepdims=True, dtype=jnp.uint32)
            total = (total + part.astype(jnp.float32)) * 2.0**-bits
        return total

    return mass
