"""Where drafts come from: another model, or the text so far."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import jax.numpy as jnp
from jax import Array, lax

from xlathe.decode.logits import Sampling, leave_only, sample
from xlathe.decode.units import NO_TOKEN
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.integers import as_integer
from xlathe.step import State, call_step, state_avals

PREFIX = "draft/"  # of the draft's arrays and state among the target's
Fix = Callable[..., Graph]
"""Makes a step graph ready to be compiled at the sizes `tokens` and `selected`."""
Read = Callable[[Mapping[str, Array], Mapping[str, Array], State], State]
"""(arrays, the arguments of a prefill's step, state) -> the drafter's state after these tokens of the prompt."""
Propose = Callable[[Mapping[str, Array], Array, Array, Array, Sampling, State], tuple[Array, Array, State]]
"""(arrays, text int32 [r, slots], lengths int32 [r], going bool [r], sampling, state) -> (drafts int32 [r, gamma],
NO_TOKEN where there is none; logits [r, gamma, vocab] that they were drawn from; state).

Row i's last token is text[i, lengths[i]]. Rows that are not going change no state."""


class Drafter(abc.ABC):
    """Proposes tokens for the target to verify. Both functions are made for fixed sizes, and pure."""

    @property
    @abc.abstractmethod
    def arrays(self) -> Mapping[str, Array]:
        """The weights, by names that begin with PREFIX."""

    @abc.abstractmethod
    def state_types(self, rows: int, slots: int) -> dict[str, Any]:
        """Returns the avals of what is remembered between calls, by names that begin with PREFIX."""

    @abc.abstractmethod
    def reader(self, fix: Fix, rows: int, tokens: int) -> Read:
        """Returns the function that reads a chunk of prompts."""

    @abc.abstractmethod
    def proposer(self, fix: Fix, rows: int, vocab: int, gamma: int) -> Propose:
        """Returns the function that proposes gamma tokens a row."""


@final
@dataclass(frozen=True)
class NGram(Drafter):
    """Proposes what followed when the end of the text was last seen (prompt look-up; A. Saxena, 2023).

    The longest end of up to n tokens that occurs earlier is looked for, and of its occurrences the last. Where what
    followed runs into the end of the text, it goes on as it would if it were repeated. A text whose last token is new
    gets no drafts. Raises OptionError where n is no positive integer.
    """

    n: int = 3

    def __post_init__(self) -> None:
        if (as_integer(self.n) or 0) < 1:
            raise OptionError(f"NGram: n must be an integer of at least 1, got {self.n!r}")

    @property
    def arrays(self) -> Mapping[str, Array]:
        return {}

    def state_types(self, rows: int, slots: int) -> dict[str, Any]:
        return {}

    def reader(self, fix: Fix, rows: int, tokens: int) -> Read:
        return lambda arrays, args, state: state

    def proposer(self, fix: Fix, rows: int, vocab: int, gamma: int) -> Propose:
        def propose(
            arrays: Mapping[str, Array], text: Array, lengths: Array, going: Array, sampling: Sampling, state: State
        ) -> tuple[Array, Array, State]:
            drafts = look_up(text, lengths, self.n, gamma)
            return drafts, leave_only(drafts, vocab), state

        return propose


def look_up(text: Array, last: Array, n: int, gamma: int) -> Array:
    """Returns int32 [r, gamma]: what followed the last earlier occurrence of each text's end; see `NGram`.

    text: int32 [r, slots]; last: int32 [r], the place of its last token. NO_TOKEN where that token is new.
    """
    places = jnp.arange(text.shape[1], dtype=jnp.int32)
    matched, going_on = jnp.zeros_like(text), jnp.ones_like(text, bool)
    for back in range(n):
        earlier, wanted = places - back, last[:, None] - back
        before = jnp.take(text, jnp.maximum(earlier, 0), axis=1)
        going_on &= (earlier >= 0) & (before == jnp.take_along_axis(text, jnp.maximum(wanted, 0), axis=1))
        matched += going_on
    matched = jnp.where(places < last[:, None], matched, 0)  # [r, slots]: how long an end ends here too
    longest = matched.max(-1, keepdims=True)
    found = jnp.where(matched == longest, places, 0).max(-1, keepdims=True)
    period = jnp.maximum(last[:, None] - found, 1)
    drafts = jnp.take_along_axis(text, found + 1 + jnp.arange(gamma, dtype=jnp.int32) % period, axis=1)
    return jnp.where(longest > 0, drafts, NO_TOKEN)


@final
@dataclass(frozen=True)
class DraftModel(Drafter):
    """Proposes what another model, a step graph of the same vocabulary, draws."""

    step: Graph

    @property
    def arrays(self) -> Mapping[str, Array]:
        return {PREFIX + name: array for name, array in self.step.arrays.items()}

    def state_types(self, rows: int, slots: int) -> dict[str, Any]:
        names = (PREFIX + name for name in self.step.names("state"))
        return dict(zip(names, state_avals(self.step, rows, slots), strict=True))

    def reader(self, fix: Fix, rows: int, tokens: int) -> Read:
        step = fix(self.step, tokens=tokens, selected=rows)
        return lambda arrays, args, state: call_step(step, _own(arrays), args, state)[1]

    def proposer(self, fix: Fix, rows: int, vocab: int, gamma: int) -> Propose:
        # Of a round whose drafts all stood the last was not read. So every step reads two tokens a row, the second
        # of them anew the next time: that costs little more than one, and a step of its own for the first would.
        step = fix(self.step, tokens=2 * rows, selected=rows)
        order = jnp.arange(rows, dtype=jnp.int32)

        def propose(
            arrays: Mapping[str, Array], text: Array, lengths: Array, going: Array, sampling: Sampling, state: State
        ) -> tuple[Array, Array, State]:
            def one_more(carry: tuple[Array, State], ahead: Array) -> tuple[tuple[Array, State], tuple[Array, Array]]:
                tokens, state = carry  # int32 [r, 2]
                positions = (lengths + ahead)[:, None] + jnp.array([-1, 0], jnp.int32)
                read = going[:, None] & (positions >= 0) & (positions < text.shape[1])
                args = {
                    "tokens": tokens.reshape(-1),
                    "positions": positions.reshape(-1),
                    "rows": jnp.where(read, order[:, None], rows).reshape(-1),
                    "select": 2 * order + 1,
                }
                logits, state = call_step(step, _own(arrays), args, state)
                logits = logits.astype(jnp.float32)
                drawn = sample(logits, sampling, lengths + ahead + 1)
                return (jnp.stack([tokens[:, 1], drawn], axis=1), state), (drawn, logits)

            ends = jnp.maximum(lengths[:, None] + jnp.array([-1, 0], jnp.int32), 0)
            tokens = jnp.take_along_axis(text, ends, axis=1)
            (_, state), drawn = lax.scan(one_more, (tokens, state), jnp.arange(gamma, dtype=jnp.int32))
            drafts, logits = (x.swapaxes(0, 1) for x in drawn)
            return drafts, logits, state

        return propose


def _own(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
