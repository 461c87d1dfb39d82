"""How many weights become zero, and which are the lowest by a score."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, final

import jax.numpy as jnp
import numpy as np


@final
@dataclasses.dataclass(frozen=True)
class Sparsity:
    """fraction: of weights that become zero. keep, of: at most `keep` of `of` successive weights of a row stay; 0 of 0
    where any may."""

    fraction: float
    keep: int = 0
    of: int = 0

    def counts(self, sizes: Sequence[int]) -> np.ndarray:
        """Returns how many become zero of weights that are compared with each other, set after set, int64 [sets].

        They sum to what it is of all weights at once, so that this is known whatever is compared.
        """
        ends = [0, *(round(self.fraction * size) for size in itertools.accumulate(sizes))]
        return np.diff(np.array(ends))


def lowest(scores: Any, count: Any) -> Any:
    """Returns bool [..., size], true where a score is among the `count` lowest of its line; of equals, the first."""
    order = jnp.argsort(scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


def lowest_of_groups(scores: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Returns bool [n, k]: the lowest scores of every `sparsity.of` successive columns of each row."""
    n, k = scores.shape
    groups = scores.reshape(n, k // sparsity.of, sparsity.of)
    return np.asarray(lowest(groups, sparsity.of - sparsity.keep)).reshape(n, k)
