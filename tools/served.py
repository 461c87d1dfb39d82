"""A step graph as it is served, as a function from tokens to logits."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import jax
import numpy as np

from xlathe.aot import fix_step
from xlathe.graph import Graph
from xlathe.step import call_step, empty_state, ring_slack

CHUNK = 128  # tokens a call


@final
@dataclass(frozen=True, eq=False)
class Served:
    """Reads rows of tokens as a prefill does, on kernels and through the cache, and gives the logits of every token.

    What a cache kept in 8 bits or a kernel's arithmetic changes is thus part of what is measured.
    """

    step: Graph

    @property
    def vocab(self) -> int:
        return self.step.vocab

    def __call__(self, tokens: Any) -> np.ndarray:
        """Returns float32 [b, t, vocab] of int32 tokens [b, t]; RequestError for what the graph does not take."""
        return np.stack([self._row(row) for row in self.step.check_tokens(tokens)])

    def _row(self, tokens: np.ndarray) -> np.ndarray:
        """A chunk is padded with tokens of a row that there is not."""
        state, logits = empty_state(self.step, rows=1), []
        for start in range(0, len(tokens), self._chunk):
            new = tokens[start : start + self._chunk]
            order = np.arange(self._chunk, dtype=np.int32)
            args = {
                "tokens": np.pad(new, (0, self._chunk - len(new))),
                "positions": start + order,
                "rows": (order >= len(new)).astype(np.int32),
                "select": order,
            }
            found, state = self._compiled(self.step.arrays, args, state)
            logits.append(np.asarray(found[: len(new)], np.float32))
        return np.concatenate(logits)

    @property
    def _chunk(self) -> int:
        return min(CHUNK, self.step.max_len, ring_slack(self.step) or CHUNK)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        fixed = fix_step(self.step, "cpu", 1, self.step.max_len, self._chunk, self._chunk)
        return jax.jit(functools.partial(call_step, fixed), donate_argnums=2)
