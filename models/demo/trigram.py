"""The baseline that the demo's models have to beat: an interpolated trigram model, modified Kneser-Ney.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1999, section 3.
"""

from dataclasses import dataclass

import numpy as np

BITS = 16  # of a token id within a packed n-gram


@dataclass(frozen=True)
class Order:
    """One order of the model: `p(w | h) = (c(h w) - D(c(h w))) / c(h) + backoff(h) p(w | shorter h)`."""

    ngrams: np.ndarray  # int64 [n], sorted: each n-gram seen, its tokens packed
    discounted: np.ndarray  # float64 [n]: the first term of the equation
    histories: np.ndarray  # int64 [m], sorted: each history seen
    backoff: np.ndarray  # float64 [m]

    def probability(self, history: np.ndarray, token: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """float64 [k]: p(token | history), given `shorter`, the probabilities of the order below."""
        seen = look_up(self.ngrams, self.discounted, history << BITS | token, missing=0.0)
        return seen + look_up(self.histories, self.backoff, history, missing=1.0) * shorter


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """`values` at the places where `wanted` stands in the sorted `keys`, else `missing`."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)


def make_order(ngrams: np.ndarray, counts: np.ndarray) -> Order:
    """Discounts the counts by D1, D2 or D3+ and hands what is taken away to the order below."""
    n1, n2, n3, n4 = (max(int((counts == n).sum()), 1) for n in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discount = np.minimum(np.maximum(discounts, 0.0)[np.minimum(counts, 3)], counts)
    histories, row = np.unique(ngrams >> BITS, return_inverse=True)
    total = np.bincount(row, counts)
    return Order(ngrams, (counts - discount) / total[row], histories, np.bincount(row, discount) / total)


@dataclass(frozen=True)
class Trigram:
    """Probabilities of the next of `vocab` tokens after two others."""

    vocab: int
    orders: tuple[Order, Order, Order]  # unigrams, bigrams, trigrams

    def probability(self, before: np.ndarray, last: np.ndarray, token: np.ndarray) -> np.ndarray:
        """float64 [k]: p(token | before, last) of k token ids each."""
        before, last, token = (np.asarray(ids, np.int64) for ids in (before, last, token))
        p = np.full(token.shape, 1.0 / self.vocab)
        histories = (np.zeros_like(token), last, before << BITS | last)
        for order, history in zip(self.orders, histories, strict=True):
            p = order.probability(history, token, p)
        return p


def train_trigram(tokens: np.ndarray, vocab: int) -> Trigram:
    """Counts the trigrams of `tokens` [n]; a lower order counts in how many contexts an n-gram occurs."""
    ids = tokens.astype(np.int64)
    trigrams, counts = np.unique(ids[:-2] << 2 * BITS | ids[1:-1] << BITS | ids[2:], return_counts=True)
    bigrams, contexts = np.unique(trigrams & ((1 << 2 * BITS) - 1), return_counts=True)
    unigrams, bigram_contexts = np.unique(bigrams & ((1 << BITS) - 1), return_counts=True)
    counted = ((unigrams, bigram_contexts), (bigrams, contexts), (trigrams, counts))
    low, middle, high = (make_order(ngrams, count) for ngrams, count in counted)
    return Trigram(vocab, (low, middle, high))
