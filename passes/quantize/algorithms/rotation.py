"""Orthogonal matrices that spread outliers over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456)."""

import numpy as np

from xlathe.errors import OptionError


def hadamard(size: int) -> np.ndarray:
    """Returns a matrix of +1 and -1 with orthogonal rows, float64 [size, size].

    By the constructions of Sylvester (powers of two) and Paley (1933: q + 1 and 2 (q + 1) for primes q), and products
    of both. Raises OptionError for a size that they do not reach.
    """
    found = _hadamard(size)
    if found is None:
        raise OptionError(f"no Hadamard matrix of {size} rows is known here")
    return found


def random_rotation(size: int, seed: int) -> np.ndarray:
    """Returns an orthogonal matrix, float64 [size, size]: a Hadamard matrix with random signs of its columns.

    Where no Hadamard matrix is known it is drawn evenly from all orthogonal ones.
    """
    generator = np.random.default_rng(seed)
    found = _hadamard(size)
    if found is not None:
        return found * generator.choice([-1.0, 1.0], size) / np.sqrt(size)
    q, r = np.linalg.qr(generator.normal(size=(size, size)))
    return q * np.sign(np.diagonal(r))


def _hadamard(size: int) -> np.ndarray | None:
    if size == 1:
        return np.ones((1, 1))
    paley = _paley(size)
    if paley is not None:
        return paley
    half = _hadamard(size // 2) if size % 2 == 0 else None
    return None if half is None else np.block([[half, half], [half, -half]])


def _paley(size: int) -> np.ndarray | None:
    """Returns the matrix of Paley's first or second construction, None where size is not of their form."""
    if size % 4:
        return None
    if _is_prime(size - 1):  # it is 3 modulo 4
        skew = np.block([[np.zeros((1, 1)), np.ones((1, size - 1))], [-np.ones((size - 1, 1)), _jacobsthal(size - 1)]])
        return skew + np.eye(size)
    q = size // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        symmetric = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), _jacobsthal(q)]])
        return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _jacobsthal(q: int) -> np.ndarray:
    """Returns whether j - i is a square (1) or not (-1) modulo the prime q; 0 on the diagonal."""
    character = -np.ones(q)
    character[np.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    return character[(np.arange(q)[None] - np.arange(q)[:, None]) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
