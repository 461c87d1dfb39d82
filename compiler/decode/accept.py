"""Which drafted tokens stand: the two rules of speculative decoding, as pure functions of arrays.

`match`, the default: a draft stands where it is the token that the target draws at its position. Draft and target draw
with the same noise, so that they agree often; what is emitted is what the target draws, whatever was drafted.

`ratio` (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a draft x of the law q stands with
probability min(1, p(x) / q(x)), and the first that falls is replaced by a token of the law max(p - q, 0), normalized.
The law of the text is the target's, but not the text that plain decoding draws with the same seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import jax
import jax.numpy as jnp
from jax import Array

from xlathe.decode.logits import Sampling, filter_logits, fold_in, gumbel, leave_only, sample, uniform
from xlathe.decode.units import NO_TOKEN

# Keys of noise that is independent of that at any position; positions are not negative.
_OF_DRAFTS, _OF_COINS = -1, -2


@final
@dataclass(frozen=True)
class Rule:
    """How drafts are drawn and judged.

    drafting: the sampling of the target -> the sampling that drafts are drawn with. judge: (logits [r, gamma + 1,
    vocab] of the target after the token before the drafts and after each, drafts int32 [r, gamma], NO_TOKEN where there
    is none, draft_logits [r, gamma, vocab] that they were drawn from, sampling, positions int32 [r] of the first draft)
    -> (int32 [r]: how many leading drafts stand, float32 [r, vocab]: logits of what follows them).
    """

    drafting: Callable[[Sampling], Sampling]
    judge: Callable[[Array, Array, Array, Sampling, Array], tuple[Array, Array]]


def agree(drafts: Array, drawn: Array) -> Array:
    """Returns how many leading drafts are the tokens drawn; both int32 [..., gamma]."""
    return jnp.cumprod(drafts == drawn, axis=-1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)


def accept(p: Array, q: Array, drafted: Array, u: Array) -> tuple[Array, Array]:
    """The ratio rule for one row: how many leading drafts stand, int32, and the law of the next token, [vocab].

    p: [gamma + 1, vocab], the target's laws; q: [gamma, vocab], the laws that the drafts are of; drafted: int32
    [gamma]; u: [gamma], uniform in [0, 1). Where drafted is NO_TOKEN, q is 0.
    """
    places = jnp.arange(drafted.shape[0])
    # u < p / q without the quotient, which has no value where both are 0. Strict: at u = 0, what cannot be stays out.
    stands = (drafted != NO_TOKEN) & (u * q[places, drafted] < p[places, drafted])
    count = jnp.cumprod(stands, dtype=jnp.int32).sum(dtype=jnp.int32)
    target = p[count]
    rest = jnp.maximum(target - jnp.pad(q, ((0, 1), (0, 0)))[count], 0)
    mass = rest.sum()
    # A draft falls with nothing left of p - q only by rounding: p is then q.
    return count, jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1), target)


def _match(
    logits: Array, drafts: Array, draft_logits: Array, sampling: Sampling, positions: Array
) -> tuple[Array, Array]:
    rows, gamma = drafts.shape
    drawn = sample(logits[:, :gamma].reshape(rows * gamma, -1), sampling.repeat(gamma), _places(positions, gamma))
    count = agree(drafts, drawn.reshape(rows, gamma))
    return count, jnp.take_along_axis(logits, count[:, None, None], axis=1)[:, 0]


def _ratio(
    logits: Array, drafts: Array, draft_logits: Array, sampling: Sampling, positions: Array
) -> tuple[Array, Array]:
    rows, gamma = drafts.shape
    coins = uniform(fold_in(sampling.repeat(gamma).keys, _OF_COINS), _places(positions, gamma)).reshape(rows, gamma)
    q = jnp.where((drafts != NO_TOKEN)[..., None], _laws(draft_logits, sampling), 0)
    count, law = jax.vmap(accept)(_laws(logits, sampling), q, drafts, coins)
    scores = jnp.log(law) + gumbel(sampling.keys, positions + count, law.shape[-1])
    return count, leave_only(scores.argmax(-1), law.shape[-1])


def _laws(logits: Array, sampling: Sampling) -> Array:
    """Returns the probabilities [r, n, vocab] that logits of this shape stand for."""
    rows, places, vocab = logits.shape
    return jnp.exp(filter_logits(logits.reshape(rows * places, vocab), sampling.repeat(places))).reshape(logits.shape)


def _places(first: Array, count: int) -> Array:
    """Returns int32 [r * count]: positions from the first of each row on."""
    return (first[:, None] + jnp.arange(count, dtype=jnp.int32)).reshape(-1)


def _apart(sampling: Sampling) -> Sampling:
    return replace(sampling, keys=fold_in(sampling.keys, _OF_DRAFTS))


RULES = {"match": Rule(lambda sampling: sampling, _match), "ratio": Rule(_apart, _ratio)}
