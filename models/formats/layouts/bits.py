"""Codes of a few bits in words of 32, one after the other from the lowest bit on, also across words."""

import numpy as np

from xlathe.storage.elements import pack_bits, unpack_bits

WORD = 32


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 [m, count] below 2**bits into int32 [m, ceil(count * bits / 32)]; what is left of the last is 0."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % WORD)))
    return to_words(pack_bits(padded, bits))[:, : count_words(codes.shape[1], bits)]


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undoes `pack`: uint8 [m, count]."""
    stream = to_bytes(words)
    whole = np.pad(stream, ((0, 0), (0, -stream.shape[1] % bits)))
    return np.asarray(unpack_bits(whole, bits))[:, :count].astype(np.uint8)  # type: ignore[arg-type]


def to_words(stream: np.ndarray) -> np.ndarray:
    """Returns bytes [m, count] as little-endian int32 [m, ceil(count / 4)]."""
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")


def to_bytes(words: np.ndarray) -> np.ndarray:
    """Undoes `to_words`: uint8 [m, 4 * count] of int32 [m, count]."""
    return np.ascontiguousarray(words).view(np.uint8)


def count_words(count: int, bits: int) -> int:
    """Returns how many words so many codes take."""
    return -(-count * bits // WORD)
