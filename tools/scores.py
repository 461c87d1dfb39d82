"""What a model's logits say of each token of a text, and how far they are from another model's.

A few numbers a token are all that is kept: of logits there are never more than those of a batch. Terms are float32,
sums over the vocabulary, logarithms and what is made from them float64.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError, XlatheError
from xlathe.verify import Model

Progress = Callable[[str, float], None]
"""Called with a description and the fraction done."""

ROWS = 8  # of a batch at most: what is computed on the way to logits takes memory too
_LOGITS = 1 << 26  # of a batch of several rows
_BLOCK = 1 << 23  # logits that are looked at at a time


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a model predicted tokens, float64 [windows, tokens]: the loss is -log p, in nats."""

    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Compared(Scores):
    """How a model predicted tokens, beside a reference.

    base_loss: the reference's; kl: KL(reference || model) of the distributions, in nats; same_top1: whether both find
    the same token likeliest; delta_p: by how much the token became more probable.
    """

    base_loss: np.ndarray
    kl: np.ndarray
    same_top1: np.ndarray
    delta_p: np.ndarray


def score(model: Model, windows: np.ndarray, first: int, progress: Progress, rows: int = ROWS) -> Scores:
    """Scores the tokens that follow positions `first` and later of windows int32 [n, length].

    rows: the most windows that are given to the model at once. Raises XlatheError where its logits are no numbers.
    """
    found = []
    for start, batch, count in _batches(windows, model.vocab, rows):
        progress("evaluate", start / len(windows))
        found += _rows(_alone, [model(batch)], batch[:count], first)
    return Scores(*_joined(found))


def compare(
    reference: Model, models: Sequence[Model], windows: np.ndarray, first: int, progress: Progress, rows: int = ROWS
) -> list[Compared]:
    """Scores models beside a reference, which reads every window once; as `score`.

    Raises OptionError where vocabularies differ.
    """
    for model in models:
        if model.vocab != reference.vocab:
            raise OptionError(
                f"models of different vocabularies cannot be compared: {reference.vocab} and {model.vocab} tokens"
            )
    found: list[list[Sequence[np.ndarray]]] = [[] for _ in models]
    for start, batch, count in _batches(windows, reference.vocab, rows):
        base = reference(batch)
        for j, model in enumerate(models):
            progress("measure quality", (start + count * j / len(models)) / len(windows))
            found[j] += _rows(_beside, [base, model(batch)], batch[:count], first)
    return [Compared(*_joined(each)) for each in found]


def _batches(windows: np.ndarray, vocab: int, rows: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields where a batch begins, its rows and how many of them count: all are equally long, for one compilation."""
    size = max(1, min(rows, len(windows), _LOGITS // (windows.shape[1] * vocab)))
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        yield start, np.resize(batch, (size, windows.shape[1])), len(batch)


def _rows(
    measure: Callable[..., Sequence[jax.Array]], logits: Sequence[jax.Array], batch: np.ndarray, first: int
) -> list[Sequence[np.ndarray]]:
    """Measures the tokens of each row, from logits [rows or more, length, vocab] of one or two models."""
    step = max(1, _BLOCK // logits[0].shape[-1])
    found: list[Sequence[np.ndarray]] = []
    with jax.enable_x64(True):
        for row, tokens in enumerate(batch):
            blocks = []
            for start in range(first, len(tokens) - 1, step):
                stop = min(start + step, len(tokens) - 1)
                blocks.append(measure(*(each[row, start:stop] for each in logits), tokens[start + 1 : stop + 1]))
            numbers = zip(*blocks, strict=True)
            found.append([np.concatenate([np.asarray(b, np.float64) for b in each]) for each in numbers])
    return found


def _joined(rows: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    joined = [np.stack(each) for each in zip(*rows, strict=True)]
    if broken := int(np.isnan(joined).any(0).sum()):
        raise XlatheError(f"logits of {broken} of {joined[0].size} tokens are no numbers")
    return joined


@jax.jit
def _alone(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """logits: [n, vocab]; tokens: int32 [n], what follows; returns the losses."""
    wide = logits.astype(jnp.float32)
    return (_log_sum(wide) - _taken(wide, tokens),)


@jax.jit
def _beside(base: jax.Array, logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """base, logits: [n, vocab]; returns the fields of `Compared`, [n] each.

    KL = sum p (a - b) - (log sum exp a - log sum exp b): the logits' difference is exact where they are close, so that
    a small divergence is not what two rounded logarithms leave.
    """
    a, b = base.astype(jnp.float32), logits.astype(jnp.float32)
    p = jax.nn.softmax(a)
    apart = jnp.where(p > 0, a - b, 0)
    total_a, total_b = _log_sum(jnp.stack([a, b]))  # at once: equal logits get equal sums
    kl = jnp.sum(p * apart, -1, dtype=jnp.float64) / jnp.sum(p, -1, dtype=jnp.float64) - (total_a - total_b)
    loss, base_loss = total_b - _taken(b, tokens), total_a - _taken(a, tokens)
    same = a.argmax(-1) == b.argmax(-1)
    return loss, base_loss, jnp.maximum(kl, 0), same, jnp.exp(-loss) - jnp.exp(-base_loss)


def _taken(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0].astype(jnp.float64)


def _log_sum(logits: jax.Array) -> jax.Array:
    """Returns log(sum(exp(logits))) of logits [..., vocab], float64."""
    largest = logits.max(-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - largest), -1, dtype=jnp.float64)
    return jnp.log(total) + largest[..., 0].astype(jnp.float64)
