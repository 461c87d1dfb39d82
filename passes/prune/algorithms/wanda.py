"""Wanda: weights count by their activations' norm (Sun et al. 2023, https://arxiv.org/abs/2306.11695)."""

import numpy as np

from xlathe.passes.prune.algorithms.sparsity import Sparsity, lowest, lowest_of_groups


def wanda(weight: np.ndarray, sum_squares: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Returns a weight [n, k] with zeros where |w| ||x|| is lowest in its row, or in each group of a pattern.

    sum_squares: [k], of the activations that each column is multiplied with.
    """
    scores = np.abs(weight) * np.sqrt(sum_squares).astype(weight.dtype)
    if sparsity.of:
        return np.where(lowest_of_groups(scores, sparsity), 0, weight)
    n, k = weight.shape
    return np.where(np.asarray(lowest(scores, sparsity.counts([k] * n)[:, None])), 0, weight)
