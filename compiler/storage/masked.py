"""Weights of which most are zero: a bit for each, and those that are kept in any other format."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.storage.cast import Cast
from xlathe.storage.elements import pack_bits, unpack_bits
from xlathe.storage.format import Format, Part
from xlathe.storage.scaled import Scaled, Steps


@final
@dataclasses.dataclass(frozen=True)
class Masked(Format):
    """`keep` of every `of` successive weights of a row; the others are zero. `of` may be all of a row.

    Where each kept weight stands is a bit of `mask`, uint8 [n, ceil(k / 8)], the first lowest. They lie side by side,
    [n, k keep / of], as `dense` stores them; its groups are of so many columns of the whole weight.
    """

    dense: Cast | Scaled
    keep: int
    of: int

    def __str__(self) -> str:
        text = str(self.dense)
        return f"{text}{',' if ':' in text else ':'}{self.keep}of{self.of}"

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    @property
    def kept(self) -> Cast | Scaled:
        """The format of what is kept."""
        if isinstance(self.dense, Cast):
            return self.dense
        return dataclasses.replace(self.dense, columns=self.dense.columns * self.keep // self.of)

    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        mask = Part((n, -(-k // 8)), jnp.dtype("uint8"))
        return {"mask": mask, **self.kept.parts(n, k * self.keep // self.of)}

    def misfit(self, n: int, k: int) -> str | None:
        if k % self.of:
            return f"{self.keep} of {self.of}: {self.of} does not divide {k}"
        return self.dense.misfit(n, k) or self.kept.misfit(n, k * self.keep // self.of)

    def encode(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        """Keeps the largest of each group, of equals the first."""
        mask = self._largest(weight)
        return pack_mask(mask), *self.kept.encode(weight[mask].reshape(len(weight), -1))

    def pack(self, levels: np.ndarray, weight: np.ndarray, steps: Steps) -> tuple[np.ndarray, ...]:
        """Returns the parts of levels [n, k], of those whose weights are the largest; steps: as `dense` has them."""
        assert isinstance(self.kept, Scaled)
        mask = self._largest(weight)
        return pack_mask(mask), *self.kept.pack(levels[mask].reshape(len(weight), -1), steps)

    def _largest(self, weight: np.ndarray) -> np.ndarray:
        """Returns bool [n, k], true for the largest of each group, of equals the first."""
        groups = np.abs(weight).reshape(len(weight), -1, self.of)
        order = np.argsort(-groups, axis=-1, kind="stable")
        mask = np.zeros(groups.shape, bool)
        np.put_along_axis(mask, order[..., : self.keep], True, axis=-1)
        return mask.reshape(weight.shape)

    def decode(self, *lines: jax.Array) -> jax.Array:
        mask, *rest = lines
        values = self.kept.decode(*rest)
        values = values.reshape(*values.shape[:-1], -1, self.keep)  # [..., groups, keep]
        k = values.shape[-2] * self.of
        bits = unpack_bits(mask, 1)[..., :k].reshape(*values.shape[:-1], self.of).astype(bool)
        place = jnp.cumsum(bits, axis=-1, dtype=jnp.int32) - 1
        found = jnp.take_along_axis(values, jnp.maximum(place, 0), axis=-1, mode="clip")
        return jnp.where(bits, found, 0).reshape(*values.shape[:-2], k)


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """Returns bool [n, k] as it is stored."""
    return pack_bits(np.pad(mask, ((0, 0), (0, -mask.shape[1] % 8))).astype(np.uint8), 1)
