"""The one logits pipeline and the one noise law: every token that xlathe emits is drawn here.

A row's law is made from its logits by temperature, then top-k, then top-p (Holtzman et al.,
arXiv 1904.09751), then min-p (Nguyen et al., arXiv 2407.01082): the order of Hugging Face transformers.
Filters act on float32 scores, (logit - largest logit) / temperature, and keep what ties with the last
token they keep.

A token is drawn by the Gumbel-max trick: the argmax of log probability plus Gumbel noise, where the noise
is a function of (row key, position, token) alone. So a row draws the same tokens by itself and in any
batch, and a speculative decoder that uses the same noise at the same position emits what plain decoding
emits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry_2x32

from xlathe.decode.threshold import cut, head_size, mass_from
from xlathe.errors import OptionError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How each of R rows is sampled: a pytree of arrays, to be passed through `jit` and loops.

    temperature: float32 [R]; divides the logits; 0 is greedy, whatever the filters. top_k: int32 [R]; keeps the tokens
    not below the k-th largest logit, and all that tie; 0 is off. top_p: float32 [R]; keeps the smallest set of
    likeliest tokens whose mass reaches p, and what ties with the least likely of them; 1 is off. min_p: float32 [R];
    keeps the tokens at least this likely, relative to the likeliest; 0 is off. keys: uint32 [R, 2]; raw threefry keys
    of the rows' noise.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    keys: Array

    @classmethod
    def of(
        cls,
        rows: int,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> "Sampling":
        """Checks the options on the host; each is one value or one per row.

        With one seed, row i is keyed by `fold_in(key(seed), i)`. A row with a seed of its own is keyed by
        `fold_in(key(seed), 0)`: it draws what it would draw as the only row.

        Raises OptionError where an option is out of range, or has neither one value nor one per row.
        """
        floats = np.finfo(np.float32)
        warmth = _per_row("temperature", temperature, rows, np.float32, 0, float(floats.max))
        return cls(
            # Dividing by a subnormal is not safe, and a temperature that small is greedy in all but name.
            temperature=jnp.asarray(np.where(warmth < floats.tiny, np.float32(0), warmth)),
            top_k=jnp.asarray(_per_row("top_k", top_k, rows, np.int32, 0, np.iinfo(np.int32).max)),
            top_p=jnp.asarray(_per_row("top_p", top_p, rows, np.float32, float(floats.tiny), 1)),
            min_p=jnp.asarray(_per_row("min_p", min_p, rows, np.float32, 0, 1)),
            keys=_row_keys(seed, rows),
        )

    def repeat(self, count: int) -> "Sampling":
        """Returns the sampling of R * count rows, each `count` times in turn."""
        return jax.tree.map(lambda option: jnp.repeat(option, count, axis=0), self)


def _per_row(name: str, value: Any, rows: int, dtype: type[np.generic], low: float, high: float) -> np.ndarray:
    kinds = "iu" if np.issubdtype(dtype, np.integer) else "iuf"
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of different lengths
        array = np.asarray(value, dtype=object)
    fits = array.shape in ((), (rows,)) and array.dtype.kind in kinds
    if not (fits and np.all((array >= low) & (array <= high))):
        kind = "an integer" if kinds == "iu" else "a number"
        raise OptionError(f"{name}: expected {kind} in [{low:g}, {high:g}], or {rows} (one per row); found {value!r}")
    return np.broadcast_to(array.astype(dtype), (rows,))


def _row_keys(seed: int | Sequence[int], rows: int) -> Array:
    """Returns uint32 [rows, 2]; a threefry key is the high and the low half of a 64-bit seed."""
    seeds = _per_row("seed", seed, rows, np.int64, 0, np.iinfo(np.int64).max)
    halves = np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=-1).astype(np.uint32)
    lanes = np.arange(rows) if np.ndim(seed) == 0 else np.zeros(rows)
    return fold_in(jnp.asarray(halves), jnp.asarray(lanes, jnp.int32))


def fold_in(keys: Array, data: Array | int) -> Array:
    """Returns uint32 [R, 2]: `jax.random.fold_in`, row by row, on raw keys; data: int32 [R], or one for all."""
    fold = jax.vmap(lambda key, number: jax.random.fold_in(_key(key), number))
    return jax.random.key_data(fold(keys, jnp.broadcast_to(jnp.asarray(data, jnp.int32), keys.shape[:1])))


def _key(raw: Array) -> Array:
    return jax.random.wrap_key_data(raw, impl="threefry2x32")


def sample(logits: Array, sampling: Sampling, positions: Array) -> Array:
    """Draws one token per row, int32 [R]; a greedy row gets its likeliest token, the lowest id where several tie.

    logits: float32 [R, V], finite or -inf; V >= 1. sampling: of R rows. positions: int32 [R], the position in its row
    of the token to be drawn.

    No noise is drawn when every row is greedy, and only that of the head where filters leave no other token; nothing
    is searched when no row filters.
    """
    chex.assert_shape(sampling.keys, (logits.shape[0], 2))
    random = sampling.temperature > 0

    def draw() -> Array:
        scores = _scores(logits, sampling)
        few = ((scores > -jnp.inf).sum(-1) <= head_size(scores.shape[1])) | ~random
        drawn = lax.cond(few.all(), _draw_among_head, _draw_among_all, scores, sampling.keys, positions)
        return jnp.where(random, drawn, _argmax(logits))

    return lax.cond(random.any(), draw, lambda: _argmax(logits))


def _draw_among_all(scores: Array, keys: Array, positions: Array) -> Array:
    return _argmax(scores + gumbel(keys, positions, scores.shape[1]))


def _draw_among_head(scores: Array, keys: Array, positions: Array) -> Array:
    """Draws the same tokens where all that can be drawn are in the head: noise for these is enough."""
    head, ids = lax.top_k(scores, head_size(scores.shape[1]))
    noisy = head + gumbel_at(keys, positions, ids)
    return jnp.where(noisy == noisy.max(-1, keepdims=True), ids, scores.shape[1] - 1).min(-1)


def filter_logits(logits: Array, sampling: Sampling) -> Array:
    """Returns the log probabilities that `sample` draws from; float32 [R, V], -inf where filtered out.

    logits: float32 [R, V], finite or -inf; V >= 1. sampling: of R rows.

    A greedy row is a point mass on its likeliest token. A row without a finite logit has no law: all -inf.
    """
    rows, vocab = logits.shape
    chex.assert_shape(sampling.keys, (rows, 2))
    scores = _scores(logits, sampling)
    mass = mass_from(scores, jnp.exp(scores), vocab)(jnp.full((rows, 1), -jnp.inf))
    law = scores - jnp.log(jnp.where(mass > 0, mass, 1))
    likeliest = jnp.arange(vocab) == _argmax(logits)[:, None]
    point = jnp.where(likeliest & (logits > -jnp.inf), 0.0, -jnp.inf)
    return jnp.where((sampling.temperature > 0)[:, None], law, point)


def leave_only(tokens: Array, vocab: int) -> Array:
    """Returns logits, float32 [..., vocab], of which only `tokens`, int32 [...], can be drawn."""
    return jnp.where(jnp.arange(vocab) == tokens[..., None], 0.0, -jnp.inf)


def uniform(keys: Array, positions: Array) -> Array:
    """Returns uniform variates in [0, 1), float32 [R], a function of (key, position) alone."""
    return jax.vmap(lambda key: jax.random.uniform(_key(key)))(fold_in(keys, positions))


def gumbel(keys: Array, positions: Array, vocab: int) -> Array:
    """Returns standard Gumbel noise for every token, float32 [R, vocab]; see `gumbel_at`."""
    return gumbel_at(keys, positions, jnp.broadcast_to(jnp.arange(vocab), (keys.shape[0], vocab)))


def gumbel_at(keys: Array, positions: Array, tokens: Array) -> Array:
    """Returns standard Gumbel noise, float32 [R, n], a function of (key, position, token) alone.

    keys: uint32 [R, 2], raw threefry keys. positions: int32 [R]. tokens: int32 [R, n].

    The law is inverted from its upper end, where the winners are: there the uniform variate has steps of 2^-31.
    `jax.random.gumbel` has steps of 2^-23, so that of a flat law over 128,000 tokens one draw in a hundred is a tie.
    """
    bits = jax.vmap(_bits_at)(fold_in(keys, positions), tokens.astype(jnp.uint32))
    uniform = ((bits >> 1).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31
    below_one = 1 - 2.0**-24
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, below_one)))


def _bits_at(key: Array, places: Array) -> Array:
    """Returns uint32 [n]: elements of `jax.random.bits` by their places, uint32 [n].

    Each is its place as a 64-bit number, encrypted, and the halves of that combined (Salmon et al., SC 2011, whose
    counter-based generators draw any element without those before it).
    """
    high, low = jnp.split(threefry_2x32(key, jnp.concatenate([jnp.zeros_like(places), places])), 2)
    return high ^ low


def _argmax(values: Array) -> Array:
    """Returns int32 [R]: the lowest index of the maximum.

    Two plain reductions: XLA:CPU does not vectorize that of `jnp.argmax`, which takes several times longer.
    """
    ids = jnp.arange(values.shape[1], dtype=jnp.int32)
    return jnp.where(values == values.max(-1, keepdims=True), ids, ids[-1]).min(-1)


def _scores(logits: Array, sampling: Sampling) -> Array:
    """Returns float32 [R, V]: log probability relative to the likeliest token, -inf where filtered out."""
    random = sampling.temperature > 0
    # The lower bound keeps a row of nothing but -inf free of NaN.
    top = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    scores = (logits - top) / jnp.where(random, sampling.temperature, 1)[:, None]
    threshold = cut(scores, jnp.where(random, sampling.top_k, 0), jnp.where(random, sampling.top_p, 1))
    kept = scores >= jnp.maximum(threshold, jnp.log(sampling.min_p)[:, None])
    return jnp.where(kept, scores, -jnp.inf)
