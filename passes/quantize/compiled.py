"""Programs that are compiled once, however often they are written."""

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import jax


class Compiled:
    """Programs by what they compute: the parts of a model that are alike but for names share one.

    A program is known by its lowered text, in which nothing has the name that it has in a model. programs: by digest.
    """

    def __init__(self) -> None:
        self.programs: dict[str, jax.stages.Compiled] = {}
        self._digests: dict[Hashable, str] = {}

    def __call__(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
        """Returns the program of a function of arguments like these: lists of arrays, which have no names either.

        key: equal for functions that are the same, which are lowered once.
        """
        if key not in self._digests:
            lowered = jax.jit(function, keep_unused=True).lower(*arguments)
            digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
            self._digests[key] = digest
            if digest not in self.programs:
                self.programs[digest] = lowered.compile()
        return self.programs[self._digests[key]]
