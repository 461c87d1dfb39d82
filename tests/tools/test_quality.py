"""Standard errors are those of closed forms, and of bootstraps where there are none."""

import numpy as np
import pytest

from xlathe.tools.quality import mean_of, perplexity_of, quantile_of, root_of, summarize
from xlathe.tools.scores import Compared

RNG = np.random.default_rng(7)
# Windows that differ: tokens of one resemble each other.
VALUES = np.exp(RNG.normal(size=(300, 30)) + 0.7 * RNG.normal(size=(300, 1)))


def bootstrap(statistic, clustered, draws=400):
    """The spread of a statistic over samples drawn again, of whole windows or of tokens."""
    found, flat = [], VALUES.reshape(-1)
    for _ in range(draws):
        if clustered:
            found.append(statistic(VALUES[RNG.integers(0, len(VALUES), len(VALUES))]))
        else:
            found.append(statistic(flat[RNG.integers(0, flat.size, flat.size)]))
    return float(np.std(found))


@pytest.mark.parametrize("clustered", [False, True])
def test_the_error_of_a_mean(clustered):
    found = mean_of(VALUES, clustered)
    assert found.mean == pytest.approx(VALUES.mean())
    assert found.error == pytest.approx(bootstrap(np.mean, clustered), rel=0.15)


def test_the_error_of_a_mean_is_what_llama_cpp_prints():
    n, square = VALUES.size, (VALUES**2).mean()
    assert mean_of(VALUES, False).error == pytest.approx(np.sqrt((square - VALUES.mean() ** 2) / (n - 1)))


def test_windows_that_differ_have_a_larger_error_than_tokens():
    assert mean_of(VALUES, True).error > 2 * mean_of(VALUES, False).error


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_the_error_of_a_quantile(share, clustered):
    found = quantile_of(VALUES, share, clustered)
    assert found.mean == np.quantile(VALUES, share)
    spread = bootstrap(lambda sample: np.quantile(sample, share), clustered)
    assert found.error == pytest.approx(spread, rel=0.3)


def test_the_error_of_a_median_is_the_closed_form():
    """sqrt(q (1 - q) / n) / density, of numbers that are uniform between 0 and 1."""
    found = quantile_of(RNG.uniform(size=(200, 100)), 0.5, False)
    assert found.error == pytest.approx(0.5 / np.sqrt(20_000), rel=0.15)


def test_errors_are_carried_through_roots_and_exponentials():
    mean = mean_of(VALUES, False)
    assert root_of(mean).error == pytest.approx(bootstrap(lambda v: np.sqrt(v.mean()), False), rel=0.15)
    assert perplexity_of(mean).error == pytest.approx(bootstrap(lambda v: np.exp(v.mean()), False), rel=0.15)
    assert root_of(mean_of(np.zeros((2, 3)), True)).error == 0
    assert perplexity_of(mean_of(np.full((2, 3), 1e4), True)).mean == np.inf


@pytest.mark.parametrize("clustered", [False, True])
def test_every_figure(clustered):
    loss, base, kl = (RNG.exponential(size=(20, 30)) for _ in range(3))
    same, delta = RNG.random((20, 30)) < 0.9, RNG.normal(size=(20, 30))
    found = summarize(Compared(loss, base, kl, same.astype(np.float64), delta), clustered)
    assert found.perplexity.mean == pytest.approx(np.exp(loss.mean()))
    assert found.base_perplexity.mean == pytest.approx(np.exp(base.mean()))
    assert found.log_ratio.mean == pytest.approx(np.log(found.perplexity.mean / found.base_perplexity.mean))
    assert found.kl.mean == pytest.approx(kl.mean())
    assert (found.kl_median.mean, found.kl_tail.mean) == (np.median(kl), np.quantile(kl, 0.99))
    assert found.delta_p.mean == pytest.approx(delta.mean())
    assert found.delta_p_rms.mean == pytest.approx(np.sqrt((delta**2).mean()))
    share = same.mean()
    assert found.same_top1.mean == share
    if not clustered:
        assert found.same_top1.error == pytest.approx(np.sqrt(share * (1 - share) / (same.size - 1)))


def test_what_two_models_find_hard_alike_is_no_error_of_their_ratio():
    base = RNG.exponential(size=(20, 30))
    nothing = np.zeros_like(base)
    found = summarize(Compared(base + 0.01, base, nothing, nothing, nothing), False)
    assert found.log_ratio.mean == pytest.approx(0.01) and found.log_ratio.error < 1e-9 < found.loss.error
