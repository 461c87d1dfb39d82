"""Weights of which a known number is zero, wherever: a bit for each, and those that are kept in any other format."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.storage.cast import Cast
from xlathe.storage.elements import unpack_bits
from xlathe.storage.format import Format, Part, as_bytes
from xlathe.storage.masked import pack_mask
from xlathe.storage.scaled import Scaled, Steps


@final
@dataclasses.dataclass(frozen=True)
class Scattered(Format):
    """`percent` of a matrix are zero, as many of a row as it may be.

    A bit of `mask`, uint8 [n, k / 8], the first lowest, says that a weight is kept. What is kept of all rows lies side
    by side in `codes`, [kept], or the bytes that they fill, as `dense` stores a row; what is kept of a row begins at
    `start`, int32 [n]. Scales are those of `dense`, of all columns.
    """

    dense: Cast | Scaled
    percent: float

    def __str__(self) -> str:
        text = str(self.dense)
        return f"{text}{',' if ':' in text else ':'}{self.percent:g}%"

    @property
    def sparsity(self) -> float:
        return self.percent / 100

    def kept(self, n: int, k: int) -> int:
        """Returns how many weights are stored."""
        return n * k - round(self.sparsity * (n * k))

    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        dense, kept = self.dense.parts(n, k), self.kept(n, k)
        bits = self.dense.levels.bits if isinstance(self.dense, Scaled) else 8
        codes = Part((-(-kept * min(bits, 8) // 8),), dense["codes"].dtype, 0)
        places = {"mask": Part((n, k // 8), jnp.dtype("uint8")), "start": Part((n,), jnp.dtype("int32"))}
        return {**places, **dense, "codes": codes}

    def misfit(self, n: int, k: int) -> str | None:
        if k % 8:
            return f"{self}: a bit a weight fills whole bytes, and 8 does not divide {k}"
        kept = self.kept(n, k)
        if not 0 < kept < min(n * k, 2**31):
            return f"{self} keeps {kept} of {n * k}; expected fewer, at least 1, and fewer than 2**31"
        return self.dense.misfit(n, k)

    def encode(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        """Keeps the largest of all, of equals the first."""
        mask = self._largest(weight)
        if isinstance(self.dense, Cast):
            return *_places(mask), *self.dense.encode(weight[mask])
        stays = np.where(mask, weight, 0)
        steps = self.dense.fit(stays)
        return self._packed(mask, self.dense.nearest(stays, *self.dense.spread(steps, stays.shape)), steps)

    def pack(self, levels: np.ndarray, weight: np.ndarray, steps: Steps) -> tuple[np.ndarray, ...]:
        """Returns the parts of levels [n, k], of those whose weights are the largest; steps: as `dense` has them."""
        return self._packed(self._largest(weight), levels, steps)

    def _packed(self, mask: np.ndarray, levels: np.ndarray, steps: Steps) -> tuple[np.ndarray, ...]:
        assert isinstance(self.dense, Scaled)
        unit, kept = self.dense.levels, levels[mask]
        codes = unit.pack(np.pad(kept, (0, -kept.size % unit.unit))[None])[0]
        return *_places(mask), codes[: -(-kept.size * unit.bits // 8)], *self.dense.pack(levels, steps)[1:]

    def _largest(self, weight: np.ndarray) -> np.ndarray:
        """Returns bool [n, k], true for the largest, of equals the first."""
        sizes, kept = np.abs(weight).ravel(), self.kept(*weight.shape)
        least = np.partition(sizes, -kept)[-kept]
        mask = sizes > least
        mask[np.flatnonzero(sizes == least)[: kept - np.count_nonzero(mask)]] = True
        return mask.reshape(weight.shape)

    def decode(self, *lines: jax.Array) -> jax.Array:
        mask, start, codes, *shared = lines
        k = mask.shape[-1] * 8
        bits = unpack_bits(mask, 1).astype(bool)
        counts = jax.lax.population_count(mask).astype(jnp.int32)
        before = start[..., None] + jnp.cumsum(counts, axis=-1) - counts  # [..., k / 8], kept before each byte
        lower = mask[..., None] & ((1 << jnp.arange(8, dtype=jnp.uint8)) - 1)  # kept before each bit of it
        place = before[..., None] + jax.lax.population_count(lower).astype(jnp.int32)
        place = place.reshape(*mask.shape[:-1], k)
        if isinstance(self.dense, Cast):
            found = self.dense.decode(jnp.take(codes, place, mode="clip"))
        else:
            found = self.dense.scaled(self.dense.levels.unpack_at(as_bytes(codes), place), *shared)
        return jnp.where(bits, found, 0)


def _places(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns bool [n, k] as it is stored, and how many are true in the rows before each."""
    counts = np.count_nonzero(mask, axis=1)
    return pack_mask(mask), (np.cumsum(counts) - counts).astype(np.int32)
