"""Magnitude pruning: the smallest weights become zero (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

import numpy as np

from xlathe.passes.prune.algorithms.sparsity import Sparsity, lowest, lowest_of_groups


def magnitude(weight: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Returns a weight [n, k] with zeros; all of its values are compared, or those of each group of a pattern."""
    scores = np.abs(weight)
    if sparsity.of:
        return np.where(lowest_of_groups(scores, sparsity), 0, weight)
    gone = np.asarray(lowest(scores.ravel(), sparsity.counts([scores.size])[0]))
    return np.where(gone.reshape(scores.shape), 0, weight)
