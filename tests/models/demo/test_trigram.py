"""The trigram baseline."""

import numpy as np

from xlathe.models.demo.trigram import train_trigram

TOKENS = np.random.default_rng(0).zipf(1.5, 5000) % 40


def test_probabilities_sum_to_one_after_seen_and_unseen_histories() -> None:
    model = train_trigram(TOKENS, vocab=50)
    for before, last in ((TOKENS[10], TOKENS[11]), (1, 49), (49, 1), (45, 46)):
        ids = np.arange(50)
        p = model.probability(np.full(50, before), np.full(50, last), ids)
        assert abs(p.sum() - 1) < 1e-9 and (p > 0).all()


def test_one_probability_by_hand() -> None:
    """ "a b c a b d": the equations of Chen and Goodman with the discounts that these counts give."""
    model = train_trigram(np.array([0, 1, 2, 0, 1, 3]), vocab=4)
    # Trigrams 012 120 201 013, each once: n1 = 4, no n2; n2, n3, n4 count as at least 1.
    # Y = 4/6 and D1 = 1 - 2 (4/6) (1/4) = 2/3; after "a b": c seen once of 2, two kinds follow.
    high, backoff = (1 - 2 / 3) / 2, 2 / 3 * 2 / 2
    # Bigrams by contexts: 12, 20, 13 once and 01 once: the same D1; after "b": c once of 2.
    middle, middle_backoff = (1 - 2 / 3) / 2, 2 / 3 * 2 / 2
    # Unigrams by bigram contexts: each of the 4 once.
    low = (1 - 2 / 3) / 4 + 2 / 3 * 4 / 4 / 4
    expected = high + backoff * (middle + middle_backoff * low)
    (actual,) = model.probability(np.array([0]), np.array([1]), np.array([2]))
    assert abs(actual - expected) < 1e-12
