"""Means of directions: coefficients of the tensors, beside formulas written out for vectors in float64."""

import numpy as np
import pytest

from xlathe.errors import PassError
from xlathe.passes.merge.combine import combine, gram
from xlathe.passes.merge.spheres import karcher, model_stock, slerp

RNG = np.random.default_rng(0)
A, B, C = RNG.normal(size=(3, 6, 1500)).astype(np.float32)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def near(found: object, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_products_are_exact_to_float32() -> None:
    """Also of many numbers of one sign, which a float32 sum would lose."""
    ones = np.full(3_000_001, 0.1, np.float32)
    expected = float(np.sum(ones.astype(np.float64) ** 2))
    np.testing.assert_allclose(gram([ones, ones]), np.full((2, 2), expected), rtol=1e-6)
    flat = [t.astype(np.float64).reshape(6, -1) for t in (A, B, C)]
    np.testing.assert_allclose(gram([A, B, C]), [[(x * y).sum() for y in flat] for x in flat], rtol=1e-5, atol=1e-2)
    rows = np.array([[(x * y).sum(axis=1) for y in flat] for x in flat]).transpose(2, 0, 1)
    np.testing.assert_allclose(gram([A, B, C], rows=True), rows, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4])
def test_slerp_goes_along_the_arc(t: float) -> None:
    a, b = A.astype(np.float64), 3 * (A + 0.5 * B).astype(np.float64)
    angle = np.arccos((unit(a) * unit(b)).sum())
    expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    tensors = [a.astype(np.float32), b.astype(np.float32)]
    near(combine(tensors, slerp(gram(tensors), t)), expected)
    rows = combine(tensors, slerp(gram(tensors, rows=True), t))
    near(rows[2:3], combine([x[2:3] for x in tensors], slerp(gram([x[2:3] for x in tensors]), t)))


def test_slerp_where_there_is_no_arc() -> None:
    """Nearly parallel: the line. No direction: the line. Opposite: an error, where others give zeros."""
    near(combine([A, 2 * A], slerp(gram([A, 2 * A]), 0.25)), 1.25 * A)
    near(combine([A, 0 * A], slerp(gram([A, 0 * A]), 0.25)), 0.75 * A)
    with pytest.raises(PassError, match=r"opposite directions \(cosine -1.000000\)"):
        slerp(gram([A, -A]), 0.5)


def test_the_karcher_mean_is_where_tangents_cancel() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    tensors = [A, A + B, 2 * (A + C)]
    mean = np.asarray(combine(tensors, karcher(gram(tensors), weights)), np.float64)
    lengths = [np.linalg.norm(t.astype(np.float64)) for t in tensors]
    assert np.linalg.norm(mean) == pytest.approx(weights @ lengths, rel=1e-6)
    m = unit(mean)
    tangents = []
    for w, t in zip(weights, tensors, strict=True):
        cosine = (unit(t.astype(np.float64)) * m).sum()
        tangents.append(w * np.arccos(cosine) / np.sin(np.arccos(cosine)) * (unit(t.astype(np.float64)) - cosine * m))
    assert np.linalg.norm(sum(tangents)) < 1e-6
    once = karcher(gram(tensors), weights, steps=1)
    assert not np.allclose(once, karcher(gram(tensors), weights), atol=1e-6)


def test_two_models_of_equal_weight_meet_in_the_middle_of_the_arc() -> None:
    """Expected: slerp at 1/2 of the directions, times the mean length."""
    tensors = [A, (A + B) * 2]
    units = [unit(t.astype(np.float64)).astype(np.float32) for t in tensors]
    length = np.mean([np.linalg.norm(t.astype(np.float64)) for t in tensors])
    expected = np.asarray(combine(units, slerp(gram(units), 0.5))) * length
    near(combine(tensors, karcher(gram(tensors), np.array([0.5, 0.5]))), expected)


def test_directions_that_have_no_mean() -> None:
    with pytest.raises(PassError, match="the directions cancel each other"):
        karcher(gram([A, -A]), np.array([0.5, 0.5]))


@pytest.mark.parametrize("sign", [1, -1])
def test_model_stock(sign: int) -> None:
    """Negative cosines would lead beyond the base, for two models and -0.9 to 18 times the mean's opposite."""
    deltas = [A + 0.8 * B, sign * A + 0.8 * B, 0.5 * A - sign * 0.1 * C]
    pairs = [(0, 1), (0, 2), (1, 2)]
    units = [unit(delta.astype(np.float64)) for delta in deltas]
    cosine = np.mean([(units[i] * units[j]).sum() for i, j in pairs])
    t = np.clip(3 * cosine / (1 + 2 * cosine), 0, 1)
    near(model_stock(gram(deltas)), np.full(3, t / 3), 1e-4)
    near(model_stock(gram([A, -0.9 * A])), np.zeros(2) + 0.0, 1e-9)
    near(model_stock(gram([A, A])), np.full(2, 0.5), 1e-5)
    near(model_stock(gram([A, 0 * A])), np.zeros(2), 1e-9)


def test_one_model_and_the_same_model_twice_are_themselves() -> None:
    near(combine([A, A], slerp(gram([A, A]), 0.3)), A)
    near(combine([A, A, A], karcher(gram([A, A, A]), np.array([0.2, 0.3, 0.5]))), A)
    near(combine([A], karcher(gram([A]), np.array([1.0]))), A)
