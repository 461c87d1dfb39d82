"""A compiled program as a function from tokens to logits, as a graph is one."""

import jax.numpy as jnp
import numpy as np

from xlathe.aot import STOP_TOKENS
from xlathe.decode.logits import Sampling
from xlathe.decode.units import NO_TOKEN, Rows
from xlathe.errors import RequestError
from xlathe.program import Program
from xlathe.step import first_state


class Forced:
    """Feeds given tokens through a program's decode unit, one call a token: what it measures is what is served.

    A unit continues with the likeliest token of the logits that it is given: these name the token wanted.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.vocab = program.vocab
        self.rows = min(program.buckets.batches)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Returns float32 logits [1, t, vocab] of int32 tokens [1, t]; RequestError for more than the program holds."""
        if tokens.shape[0] != 1 or tokens.shape[1] > self.program.buckets.slots:
            raise RequestError(f"expected tokens [1, up to {self.program.buckets.slots}], got {list(tokens.shape)}")
        decode = self.program.calls[f"decode_r{self.rows}"]
        state = first_state(self.program.state_avals[self.rows])
        greedy, stops = Sampling.of(self.rows), jnp.full(STOP_TOKENS, NO_TOKEN, jnp.int32)
        logits = []
        for position, token in enumerate(tokens[0]):
            rows = self._about_to_take(int(token), position)
            _, rows, state = decode(self.program.arrays, rows, greedy, stops, jnp.int32(1), state)
            logits.append(np.asarray(rows.logits[0]))
        return np.stack(logits)[None]

    def _about_to_take(self, token: int, position: int) -> Rows:
        """Only row 0 is active, and not at its last token, after which no logits would be computed."""
        each = jnp.arange(self.rows, dtype=jnp.int32)
        wanted = jnp.zeros((self.rows, self.vocab), jnp.float32).at[:, token].set(1)
        return Rows(wanted, jnp.full_like(each, position), each == 0, jnp.full_like(each, 2))
