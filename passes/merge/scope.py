"""Ranks over a whole model: which magnitudes of its changes are kept, where one share is taken of all tensors together.

Ranks are exact, and depend neither on the order of tensors nor on shards."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax

from xlathe.errors import OptionError
from xlathe.passes.merge.masks import places
from xlathe.passes.merge.ranks import at_ranks


@dataclasses.dataclass(frozen=True)
class Band:
    """The magnitudes that are kept, both ends included: all numbers that are equal to an end are."""

    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Change:
    """What a model changed in one tensor. read: returns it, float32 [...]; density, gamma: as of `without_outliers`."""

    model: str
    name: str
    size: int
    read: Callable[[], jax.Array]
    density: float
    gamma: float


def check_shares(changes: Iterable[Change]) -> None:
    """Raises OptionError where a model's tensors have several densities, of which no threshold could be made."""
    first: dict[str, Change] = {}
    for each in changes:
        one = first.setdefault(each.model, each)
        if (one.density, one.gamma) != (each.density, each.gamma):
            raise OptionError(
                f"scope=model takes one density and gamma for all tensors of {each.model}; found {one.density}, "
                f"{one.gamma} for {one.name} and {each.density}, {each.gamma} for {each.name}"
            )


def find_bands(changes: Sequence[Change]) -> dict[str, Band]:
    """Returns what is kept of each model's changes, all taken as one vector. Reads every tensor twice."""
    found = {}
    for model in dict.fromkeys(each.model for each in changes):
        own = [each for each in changes if each.model == model]
        top, count = places(sum(each.size for each in own), own[0].density, own[0].gamma)
        most, least = at_ranks(lambda own=own: (each.read() for each in own), [top, top + count - 1])  # type: ignore[misc]
        found[model] = Band(least, most)
    return found
