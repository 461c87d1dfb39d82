"""Losses of distillation, one number a token; sums over the vocabulary are float32 whatever the logits are.

With a temperature tau distributions are softmax(logits / tau), and every divergence is multiplied by tau^2, so that its
gradients keep their size as tau grows: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlathe.errors import OptionError


class TopK(NamedTuple):
    """What is left of a distribution over a vocabulary: its likeliest tokens, and all others in one bucket.

    ids: int32 [..., k]; log_probs: [..., k], of these; rest: [...], the log probability of all others together, -inf
    where there are none.
    """

    ids: jax.Array
    log_probs: jax.Array
    rest: jax.Array


def log_probabilities(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns log softmax(logits / temperature) over the last axis, float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def forward_kl(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns tau^2 KL(teacher || student) of logits [..., vocab], float32 [...], in nats."""
    log_s, log_t = (log_probabilities(each, temperature) for each in (student, teacher))
    return temperature**2 * _kl(log_t, log_s)


def reverse_kl(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns tau^2 KL(student || teacher) of logits [..., vocab], float32 [...], in nats."""
    return forward_kl(teacher, student, temperature)


def jsd(student: jax.Array, teacher: jax.Array, beta: float = 0.5, temperature: float = 1.0) -> jax.Array:
    """Returns tau^2 JSD(beta) of logits [..., vocab], float32 [...]: the generalized Jensen-Shannon divergence.

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student: Agarwal et al. 2023,
    https://arxiv.org/abs/2306.13649. It vanishes as beta goes to 0 or 1, where JSD / beta and JSD / (1 - beta) tend to
    the two divergences; at the ends, 0 stands for forward_kl and 1 for reverse_kl, so it jumps there. Raises
    OptionError for a beta outside 0 to 1.
    """
    if not 0 <= beta <= 1:
        raise OptionError(f"jsd: beta={beta}: expected 0 (forward KL) to 1 (reverse KL)")
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, teacher, temperature)
    log_s, log_t = (log_probabilities(each, temperature) for each in (student, teacher))
    mixed = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))  # of probabilities, not of logarithms
    return temperature**2 * (beta * _kl(log_t, mixed) + (1 - beta) * _kl(log_s, mixed))


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns -log p(token) of logits [..., vocab] and int32 tokens [...], float32 [...], in nats."""
    return -jnp.take_along_axis(log_probabilities(logits), tokens[..., None], axis=-1)[..., 0]


def top_k(logits: jax.Array, k: int, temperature: float = 1.0) -> TopK:
    """Returns the k likeliest tokens of softmax(logits / temperature), logits [..., vocab]; k <= vocab.

    The bucket is what the others sum to at this temperature, which it cannot be given another of later.
    """
    scaled = logits.astype(jnp.float32) / temperature
    total = jax.nn.logsumexp(scaled, axis=-1)
    values, ids = jax.lax.top_k(scaled, k)
    others = jnp.put_along_axis(scaled, ids, -jnp.inf, axis=-1, inplace=False)
    return TopK(ids.astype(jnp.int32), values - total[..., None], _log_sum(others) - total)


def top_k_kl(student: jax.Array, teacher: TopK, temperature: float = 1.0) -> jax.Array:
    """Returns tau^2 KL(teacher || student) over k tokens and the bucket of all others, float32 [...], in nats.

    student: logits [..., vocab]; temperature: the one that `teacher` was made with. It is at most the divergence over
    the whole vocabulary and reaches it at k = vocab. What the student puts on other tokens counts, which re-normalizing
    both sides over the k tokens would not see.
    """
    scaled = student.astype(jnp.float32) / temperature
    total = jax.nn.logsumexp(scaled, axis=-1)
    own = jnp.take_along_axis(scaled, teacher.ids, axis=-1) - total[..., None]
    others = jnp.put_along_axis(scaled, teacher.ids, -jnp.inf, axis=-1, inplace=False)
    log_p = jnp.concatenate([teacher.log_probs.astype(jnp.float32), teacher.rest[..., None].astype(jnp.float32)], -1)
    log_q = jnp.concatenate([own, (_log_sum(others) - total)[..., None]], -1)
    return temperature**2 * _kl(log_p, log_q)


def squared_error(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns the squared difference of features [..., width] over the teacher's mean square, float32 [...].

    Both are means over the width, so that neither the scale of a residual stream nor its width is a factor.
    """
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    return jnp.square(s - t).mean(-1) / jnp.maximum(jnp.square(t).mean(-1), 1e-12)


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns 1 - cosine of features [..., width], float32 [...]; 1 where one of them is zero."""
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    squares = jnp.square(s).sum(-1) * jnp.square(t).sum(-1)
    return 1 - (s * t).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def masked_sum(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of `values` [...] where `mask` (bool, the same shape) holds, and how many these are, float32 [].

    Sums and counts of parts of a batch add up to those of the whole; means do not.
    """
    return jnp.where(mask, values, 0).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Returns sum p (log p - log q) over the last axis, where 0 (log 0 - log q) is 0."""
    p = jnp.exp(log_p)
    apart = jnp.where(p > 0, log_p, 0) - jnp.where(p > 0, log_q, 0)
    return (p * apart).sum(-1)


def _log_sum(values: jax.Array) -> jax.Array:
    """Returns log sum exp over the last axis; -inf, with gradients of zero, where every value is -inf."""
    some = jnp.isfinite(values).any(-1)
    found = jax.nn.logsumexp(jnp.where(some[..., None], values, 0), axis=-1)
    return jnp.where(some, found, -jnp.inf)
