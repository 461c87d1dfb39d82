"""Importance matrices of llama.cpp's `imatrix`: the mean square of each input of each matrix over a text."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlathe.errors import CheckpointError, as_path
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.container import MAGIC, Container, open_container

Importance = Mapping[str, np.ndarray]
"""float32 [matrices, columns] by the name of a tensor in GGUF; experts have a matrix each."""
SUMS, COUNTS = ".in_sum2", ".counts"


def read_importance(path: Any) -> Importance:
    """Reads a GGUF file of sums and counts, or the older `.dat`.

    A matrix that no input reached weighs all its columns alike. Raises CheckpointError for a damaged file, and for
    weights that are negative or not finite.
    """
    path = as_path(path, CheckpointError)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: expected an importance matrix: {error.strerror}") from None
    found = _of_gguf(open_container(path)) if is_gguf else _of_dat(path)
    if not found:
        raise CheckpointError(f"{path}: expected sums of squares (tensors named *{SUMS}), found none")
    for name, weights in found.items():
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise CheckpointError(f"{path}: {name!r}: expected finite weights >= 0, found others")
    return found


def _of_gguf(file: Container) -> dict[str, np.ndarray]:
    found = {}
    for name in file.entries:
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        if stem + COUNTS not in file.entries:
            raise CheckpointError(f"{file.path}: tensor {name!r}: expected {stem + COUNTS!r} beside it, found none")
        sums, counts = (as_tensor(file, file.entries[stem + part]).read().astype(np.float32) for part in (SUMS, COUNTS))
        sums = sums.reshape(-1, sums.shape[-1])
        if counts.size != len(sums):
            raise CheckpointError(f"{file.path}: {stem!r}: expected {len(sums)} counts, found {counts.size}")
        found[stem] = _means(sums, counts.reshape(-1, 1))
    return found


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.where(counts > 0, sums / counts, np.float32(1))


def _of_dat(path: Path) -> dict[str, np.ndarray]:
    """Reads: entries, then of each the length of its name, the name, calls, the number of sums, float32 sums."""
    data, at = path.read_bytes(), 0

    def number() -> int:
        nonlocal at
        at += 4
        if at > len(data):
            raise CheckpointError(f"{path}: expected an importance matrix, found {len(data)} bytes that end in one")
        return int(struct.unpack_from("<i", data, at - 4)[0])

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 < size <= len(data) - at:
            raise CheckpointError(f"{path}: expected an importance matrix, found an entry of {size} bytes at {at}")
        at += size
        return data[at - size : at]

    found = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        sums = np.frombuffer(take(4 * number()), "<f4")
        found[name] = (sums / np.float32(calls) if calls > 0 else sums)[None]
    return found
