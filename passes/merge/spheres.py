"""Averages of directions: SLERP, the Karcher mean, Model Stock. Each is a weighted sum of the tensors it is given.

A function takes the inner products of the tensors (`combine.gram`, float64 [n, n] or [rows, n, n]) and returns the
coefficients, float64 [n] or [n, rows], for `combine.combine`: every mean of directions lies in their span, so that
the iterations run on n numbers and not on the tensors.
"""

import numpy as np

from xlathe.errors import PassError

NEARLY_ZERO = 1e-8
"""A tensor shorter than this has no direction."""
NEARLY_PARALLEL = 1 - 5e-4
"""Beyond this cosine the arc is a line, to float32's precision."""


def slerp(products: np.ndarray, t: float) -> np.ndarray:
    """Coefficients of the point a fraction `t` of the way from the first to the second tensor, along the arc between
    their directions; lengths go along (Shoemake 1985).

    Nearly parallel tensors, and those without a direction, are averaged on the line. Raises PassError for opposite
    ones, between which there is no shortest arc.
    """
    line = np.array([1 - t, t])
    if products.ndim == 3:
        return np.stack([slerp(each, t) for each in products], axis=1)
    lengths = _lengths(products)
    if lengths.min() < NEARLY_ZERO:
        return line
    cosine = products[0, 1] / (lengths[0] * lengths[1])
    if cosine < -NEARLY_PARALLEL:
        raise PassError(f"slerp: the tensors point in opposite directions (cosine {cosine:.6f}): no arc is shortest")
    if cosine > NEARLY_PARALLEL:
        return line
    angle = np.arccos(cosine)
    return np.sin(line * angle) / np.sin(angle)


def karcher(products: np.ndarray, weights: np.ndarray, *, steps: int = 100, tolerance: float = 1e-9) -> np.ndarray:
    """Coefficients of the weighted mean of directions on the sphere, times the weighted mean of lengths: the point
    whose tangents to all directions, each as long as its arc, have a weighted sum of 0 (Karcher 1977).

    weights: float [n], of sum 1. steps: the most iterations; after one, this is multi-SLERP, the point that the
    tangents at the normalized weighted sum lead to. Raises PassError where the directions cancel each other, or where
    one is opposite to the mean.
    """
    lengths = _lengths(products)
    if lengths.min() < NEARLY_ZERO:
        return np.array(weights)
    units = products / np.outer(lengths, lengths)
    mean = _unit(weights, units)
    for _ in range(steps):
        cosines = np.clip(units @ mean, -1, 1)
        if cosines.min() < -NEARLY_PARALLEL:
            raise PassError("karcher: a tensor points away from the mean of all: no arc is shortest")
        arcs = np.arccos(cosines)
        pulls = weights / np.sinc(arcs / np.pi)  # an arc over its sine
        tangent = pulls - (pulls @ cosines) * mean
        length = np.sqrt(max(tangent @ units @ tangent, 0))
        if length < tolerance:
            break
        mean = _unit(np.cos(length) * mean + np.sin(length) / length * tangent, units)
    return mean / lengths * (weights @ lengths)


def model_stock(products: np.ndarray) -> np.ndarray:
    """Coefficients of changes from the base: their mean times t = n c / (1 + (n - 1) c), c the mean cosine of pairs
    (Jang et al. 2024, arXiv 2403.19522).

    t is kept between 0, the base, and 1, the plain mean: for negative cosines the formula leaves that range. A change
    of length 0 has the cosine 0 with others. products: [n, n] or [rows, n, n] with n of at least 2.
    """
    if products.ndim == 3:
        return np.stack([model_stock(each) for each in products], axis=1)
    count, lengths = len(products), _lengths(products)
    norms = np.outer(lengths, lengths)
    cosines = np.where(norms > NEARLY_ZERO**2, products / np.where(norms > 0, norms, 1), 0)
    mean = (cosines.sum() - np.trace(cosines)) / (count * (count - 1))
    factor = np.clip(count * mean / (1 + (count - 1) * max(mean, 0)), 0, 1)
    return np.full(count, factor / count)


def _lengths(products: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.diagonal(products), 0))


def _unit(coefficients: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Returns the coefficients of unit vectors divided by their sum's length."""
    length = np.sqrt(max(coefficients @ units @ coefficients, 0))
    if length < NEARLY_ZERO:
        raise PassError("karcher: the directions cancel each other, so that they have no mean")
    return coefficients / length
