"""SmoothQuant: outliers move from activations, where they are costly to round, into weights.

Xiao et al. 2022, https://arxiv.org/abs/2211.10438.
"""

from collections.abc import Sequence

import numpy as np

SMALLEST = 1e-5


def smooth_scales(weights: Sequence[np.ndarray], absmax: np.ndarray, alpha: float) -> np.ndarray:
    """Returns max|x|^alpha / max|w|^(1 - alpha) of each channel, float64 [k]; 1 where a channel was always zero.

    weights: [n, k] each, all that read these activations; absmax: of the activations, [k]. The weights' columns are
    to be multiplied with it and the activations divided by it.
    """
    largest = np.max([np.abs(np.asarray(w, np.float64)).max(axis=0) for w in weights], axis=0)
    activations = np.asarray(absmax, np.float64)
    scales = np.maximum(activations, SMALLEST) ** alpha / np.maximum(largest, SMALLEST) ** (1 - alpha)
    return np.where(activations > 0, np.maximum(scales, SMALLEST), 1.0)
