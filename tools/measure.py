"""What `xlathe demo` and `xlathe eval` measure: quality on windows of tokens, and speed."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from xlathe.program import Program, Stats
from xlathe.tools.bench_kernels import memory_read
from xlathe.verify import Comparison, Estimate, Model, compare, perplexity

Progress = Callable[[str, float], None]
"""Called with a description and the fraction done."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """How a model predicts, beside the one that it came from; loss and KL divergence in nats a token."""

    loss: Estimate
    perplexity: Estimate
    kl: Estimate
    same_top1: Estimate


@dataclasses.dataclass(frozen=True)
class Speed:
    """Medians over rounds.

    prefill, decode: tokens a second; read_limit: bytes a second when as many bytes as the weights have are
    read and nothing else is done.
    """

    prefill: float
    decode: float
    read_limit: float


def qualities(
    reference: Model, models: Sequence[Model], windows: np.ndarray, progress: Progress
) -> list[Quality]:
    """Compares models with the one that they came from on windows int32 [n, length], n >= 2.

    Tokens of one window resemble each other, so that the standard errors are those of the mean over windows
    (clustered standard errors, https://arxiv.org/abs/2411.00640).
    """
    compared: list[list[Comparison]] = [[] for _ in models]
    for i, window in enumerate(windows):
        known = _Known(reference.vocab, np.asarray(reference(window[None])))
        for j, model in enumerate(models):
            progress("measure quality", (i + j / len(models)) / len(windows))
            compared[j].append(compare(known, model, window[None]))
    return [_quality(each) for each in compared]


@dataclasses.dataclass(frozen=True)
class _Known:
    """A model whose logits [1, t, vocab] of one window are known."""

    vocab: int
    logits: np.ndarray

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return self.logits


def _quality(windows: Sequence[Comparison]) -> Quality:
    loss = over_windows([math.log(each.perplexity_b.mean) for each in windows])
    return Quality(
        loss,
        perplexity_of(loss),
        over_windows([each.kl.mean for each in windows]),
        over_windows([each.same_top1.mean for each in windows]),
    )


def held_out_loss(model: Model, windows: np.ndarray, progress: Progress) -> Estimate:
    """Returns the negative log-likelihood in nats a token, as `quality` does, of one model alone."""
    losses = []
    for i, window in enumerate(windows):
        progress("evaluate", i / len(windows))
        losses.append(math.log(perplexity(model, window[None]).mean))
    return over_windows(losses)


def perplexity_of(loss: Estimate) -> Estimate:
    """Returns exp(loss), the error carried to first order."""
    return Estimate(math.exp(loss.mean), math.exp(loss.mean) * loss.error)


def bits_per_byte(loss: Estimate, tokens: int, text: str) -> Estimate:
    """Returns a loss in nats a token as bits a byte of the text, which has so many tokens."""
    factor = tokens / len(text.encode()) / math.log(2)
    return Estimate(factor * loss.mean, factor * loss.error)


def over_windows(means: Sequence[float]) -> Estimate:
    """Returns the mean of one number a window, and its standard error."""
    return Estimate(float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(means))))


def speeds(
    programs: Sequence[tuple[Program, int]],
    prompt: Sequence[int],
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> list[Speed]:
    """Times programs, each with the bytes of its weights, on one row.

    All take turns, so that a disturbance of the machine meets them alike. The first round does not count.
    """
    reads = [memory_read(size) for _, size in programs]
    runs: list[list[Stats]] = [[] for _ in programs]
    for number in range(rounds + 1):
        progress("measure speed", number / (rounds + 1))
        for (program, _), stats, read in zip(programs, runs, reads, strict=True):
            stats.append(program.generate([prompt], max_tokens=new_tokens)[0].stats)
            read.measure()
    return [
        Speed(
            float(np.median([run.prompt_tokens / run.prefill_seconds for run in stats[1:]])),
            float(np.median([run.new_tokens / run.decode_seconds for run in stats[1:]])),
            size / float(np.median(read.seconds[1:])),
        )
        for (_, size), stats, read in zip(programs, runs, reads, strict=True)
    ]
