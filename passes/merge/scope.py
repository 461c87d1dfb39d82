"""What ranks keep of a model's changes: of one tensor's, or of all tensors' together. Tensors are read in blocks."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.passes.merge.masks import Rescale, marks, places
from xlathe.passes.merge.ranks import Band, find_band, find_whole_band
from xlathe.passes.merge.tasks import change
from xlathe.safetensors_file import Tensor

BLOCK = 1 << 22
"""Numbers that are merged at a time, about."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """The numbers of a change that are kept, and what they are multiplied by."""

    band: Band
    factor: float


@dataclasses.dataclass(frozen=True)
class Change:
    """What a model changed in one tensor of a base; density, gamma: as of `masks.without_outliers`."""

    model: str
    name: str
    tensor: Tensor
    base: Tensor
    density: float
    gamma: float

    @property
    def size(self) -> int:
        return int(np.prod(self.tensor.shape))

    def read(self) -> Iterator[jax.Array]:
        """Yields float32 blocks, in order."""
        for tensor, base in zip(blocks(self.tensor), blocks(self.base), strict=True):
            yield change(tensor, base)


def blocks(tensor: Tensor) -> Iterator[jax.Array]:
    """Yields a tensor's rows in order, [at most BLOCK // width or 1, width], in its dtype; a vector whole.

    Axes before the last one are rows together. There is at least one block.
    """
    array = tensor.read()
    if array.ndim < 2:
        yield jnp.asarray(array.reshape(-1))
        return
    width = array.shape[-1]
    matrix = array.reshape(-1, width) if array.size else array.reshape(0, width)
    rows = max(BLOCK // max(width, 1), 1)
    for start in range(0, max(len(matrix), 1), rows):
        yield jnp.asarray(matrix[start : start + rows])


def check_shares(changes: Iterable[Change]) -> None:
    """Raises OptionError where a model's tensors have several densities, of which no threshold could be made."""
    first: dict[str, Change] = {}
    for each in changes:
        one = first.setdefault(each.model, each)
        if (one.density, one.gamma) != (each.density, each.gamma):
            raise OptionError(
                f"scope=model takes one density and gamma for all tensors of {each.model}; found {one.density:g}, "
                f"{one.gamma:g} for {one.name} and {each.density:g}, {each.gamma:g} for {each.name}"
            )


def find_bands(changes: Sequence[Change]) -> dict[str, Band]:
    """Returns what is kept of each model's changes, all taken as one vector. Reads every tensor twice."""
    found = {}
    for model in dict.fromkeys(each.model for each in changes):
        own = [each for each in changes if each.model == model]
        top, count = places(sum(each.size for each in own), own[0].density, own[0].gamma)
        found[model] = find_whole_band(lambda own=own: (b for each in own for b in each.read()), top, count)  # type: ignore[misc]
    return found


def keep(given: Change, rescale: Rescale, whole: Callable[[], Band] | None) -> Kept:
    """Returns what is kept of a change. whole: gives the band of the whole model, where ranks are over that."""
    band = _band(given) if whole is None else whole()
    if rescale == "l1":
        return Kept(band, _of_equal_sum(given, band))
    return Kept(band, 1 / given.density if rescale == "keep_prob" else 1.0)


def _band(given: Change) -> Band:
    top, count = places(given.size, given.density, given.gamma)
    return Band() if count >= given.size else find_band(given.read, top, count)


def _of_equal_sum(given: Change, band: Band) -> float:
    """Returns the factor that restores the sum of magnitudes, 1 where nothing but zeros is kept."""
    total, left, start = 0.0, 0.0, 0
    for delta in given.read():
        magnitude = jnp.abs(delta)
        total += float(magnitude.sum())
        left += float(jnp.where(marks(delta, band, start), magnitude, 0).sum())
        start += delta.size
    return total / left if left > 0 else 1.0
