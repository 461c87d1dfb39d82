"""Rows to encode, easy and hard, from raw random bits alone: the same float32 with every version of NumPy."""

import numpy as np

COLUMNS = 768


def bell(seed: int, *shape: int) -> np.ndarray:
    """Returns sums of four uniform numbers, float32, exact."""
    size = int(np.prod(shape))
    raw = np.random.PCG64(seed).random_raw(size).view("<u2").reshape(size, 4)
    return ((raw.sum(1, dtype=np.int64) - 2 * 65535) / 65536).astype(np.float32).reshape(shape)


def rows() -> np.ndarray:
    """Returns float32 [n, 768], three blocks of 256 a row: weights, and what goes wrong at the edges."""
    c = COLUMNS
    usual = bell(1, 24, c) * np.float32(0.02)
    tails = bell(2, 16, c)
    tails = tails * tails * tails * tails * tails  # a power is not the same on all processors
    scaled = bell(3, 32, c) * np.ldexp(np.float32(1), np.arange(-26, 6))[:, None]
    shifted = bell(4, 8, c) + np.arange(-4, 4, dtype=np.float32)[:, None]
    one_sign = np.abs(bell(5, 8, c)) * np.where(np.arange(8) % 2, 1, -1).astype(np.float32)[:, None]
    grid = np.trunc(bell(6, 8, c) * 8) / 8  # ties
    halves = np.tile(np.arange(-16, 16, dtype=np.float32) / 2, (1, c // 32))
    denormal = bell(7, 6, c) * np.float32(2.0**-100) * np.ldexp(np.float32(1), -np.arange(26, 50, 4))[:, None]
    sparse = np.where(np.arange(c) % 3 == 0, bell(8, 8, c), np.float32(0))
    holes = bell(9, 8, c)  # parts of a block that are zero, or nothing
    holes[:, :128] = 0
    holes[:, 288:320] = 1e-17
    constant = np.repeat(np.array([[0], [-0.0], [0.37], [-2.5], [1e-42], [1e-16], [1e-15]], np.float32), c, axis=1)
    signed_zeros = np.where(np.arange(c) % 2, np.float32(-0.0), np.float32(0))[None]
    spike = np.full((1, c), 1e-6, np.float32)
    spike[0, 5] = 6e3
    large = bell(10, 4, c) * np.float32(1e4)
    parts = (usual, tails, scaled, shifted, one_sign, grid, halves, denormal, sparse, holes, constant, signed_zeros)
    return np.concatenate([*parts, spike, large]).astype(np.float32)


def importance() -> np.ndarray:
    """Returns float32 [768]: squares, among them zeros, and whole parts of zeros."""
    weights = bell(11, COLUMNS) ** 2
    weights[::7] = 0
    weights[64:128] = 0
    return weights
