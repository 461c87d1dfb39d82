"""Figures on how well a model predicts, each with its standard error, from what was found of every token."""

import dataclasses
import math

import numpy as np

from xlathe.tools.scores import Compared
from xlathe.verify import Estimate

TAIL = 0.99  # the share of tokens with a smaller divergence


@dataclasses.dataclass(frozen=True)
class Quality:
    """How a model predicts, beside the one that it came from; in nats a token where nothing else is said.

    log_ratio: of the perplexity to the reference's, whose error is small where both find the same tokens hard.
    kl, kl_median, kl_tail: the divergence's mean, median and 99th percentile. delta_p, delta_p_rms: the mean and the
    root mean square of what the right token's probability gained.
    """

    loss: Estimate
    perplexity: Estimate
    base_perplexity: Estimate
    log_ratio: Estimate
    kl: Estimate
    kl_median: Estimate
    kl_tail: Estimate
    same_top1: Estimate
    delta_p: Estimate
    delta_p_rms: Estimate


def summarize(scores: Compared, clustered: bool) -> Quality:
    """Returns the figures; clustered: as `mean_of`."""
    loss, base = (mean_of(each, clustered) for each in (scores.loss, scores.base_loss))
    return Quality(
        loss=loss,
        perplexity=perplexity_of(loss),
        base_perplexity=perplexity_of(base),
        log_ratio=mean_of(scores.loss - scores.base_loss, clustered),
        kl=mean_of(scores.kl, clustered),
        kl_median=quantile_of(scores.kl, 0.5, clustered),
        kl_tail=quantile_of(scores.kl, TAIL, clustered),
        same_top1=mean_of(scores.same_top1, clustered),
        delta_p=mean_of(scores.delta_p, clustered),
        delta_p_rms=root_of(mean_of(scores.delta_p**2, clustered)),
    )


def mean_of(values: np.ndarray, clustered: bool) -> Estimate:
    """Returns the mean of numbers [windows, tokens] and its standard error.

    clustered: windows are independent and their tokens are not (https://arxiv.org/abs/2411.00640); else all tokens are.
    """
    samples = values.mean(1) if clustered else values.reshape(-1)
    error = float(samples.std(ddof=1)) / math.sqrt(samples.size) if samples.size > 1 else math.nan
    return Estimate(float(values.mean()), error)


def quantile_of(values: np.ndarray, share: float, clustered: bool) -> Estimate:
    """Returns a quantile and its standard error, by Woodruff (https://doi.org/10.1080/01621459.1952.10483443).

    The share of numbers that are not larger has an error; between the quantiles that far to either side lie two of the
    quantile's.
    """
    found = float(np.quantile(values, share))
    spread = mean_of((values <= found).astype(np.float64), clustered).error
    low, high = np.quantile(values, [max(0.0, share - spread), min(1.0, share + spread)])
    return Estimate(found, float(high - low) / 2)


def root_of(square: Estimate) -> Estimate:
    """Returns the root, the error carried to first order."""
    root = math.sqrt(square.mean)
    return Estimate(root, square.error / (2 * root) if root else 0.0)


def perplexity_of(loss: Estimate) -> Estimate:
    """Returns exp(loss), the error carried to first order; infinity where it is beyond float64."""
    mean = math.exp(loss.mean) if loss.mean < math.log(np.finfo(np.float64).max) else math.inf
    return Estimate(mean, mean * loss.error)


def bits_per_byte(loss: Estimate, tokens_per_byte: float) -> Estimate:
    """Returns a loss in nats a token as bits a byte of the text."""
    factor = tokens_per_byte / math.log(2)
    return Estimate(factor * loss.mean, factor * loss.error)
