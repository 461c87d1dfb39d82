"""How many weights become zero, and which are the lowest by a score."""

import dataclasses
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

    def count(self, size: int) -> int:
        """Returns how many of some weights that are compared with each other become zero."""
        return self.of - self.keep if self.of else round(self.fraction * size)


def lowest(scores: Any, count: Any) -> Any:
    """Returns bool [..., size], true where a score is among the `count` lowest of its line; of equals, the first."""
    order = jnp.argsort(scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


def lowest_of_groups(scores: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Returns bool [n, k]: the lowest scores of every `sparsity.of` successive columns of each row."""
    n, k = scores.shape
    groups = scores.reshape(n, k // sparsity.of, sparsity.of)
    return np.asarray(lowest(groups, sparsity.count(sparsity.of))).reshape(n, k)
