"""Speculative decoding in one compiled loop: a drafter proposes gamma tokens, and the target reads them in one step.

A round draws a row's next token from its logits, as plain decoding does, and lets the drafter go on from there; the
target gives logits after that token and after each draft, and a rule (`xlathe.decode.accept`) says how many drafts
stand. Each row keeps its own. What fell is rolled back by length alone: its slots in the caches lie past the row's end,
where nothing reads, and are written again before they do not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import Array, lax

from xlathe.decode.accept import RULES
from xlathe.decode.drafters import Drafter, Propose, Read
from xlathe.decode.logits import Sampling, sample
from xlathe.decode.units import NO_TOKEN, Arrays, Rows, prefill_unit
from xlathe.graph import Graph
from xlathe.step import State, call_step


@final
@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a program drafts: by whom, and by which rule of `RULES` drafts are judged."""

    drafter: Drafter
    rule: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program with a drafter remembers of r rows.

    text: int32 [r, slots], tokens by position; tally: int32 [r, 2, gamma + 1], how often a token was offered and how
    often it stood, by its place in a round, of which the first is the target's own; target and draft: their caches.
    """

    text: Array
    tally: Array
    target: State
    draft: State

    @staticmethod
    def types(rows: int, slots: int, gamma: int) -> dict[str, Any]:
        """Returns the avals of text and tally, by name."""
        shapes = {"text": (rows, slots), "tally": (rows, 2, gamma + 1)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    @staticmethod
    def of(state: State, cached: int) -> "Memory":
        """Reads the flat form, in which `cached` caches of the target come before those of the draft."""
        text, tally, *caches = state
        return Memory(text, tally, tuple(caches[:cached]), tuple(caches[cached:]))

    @property
    def flat(self) -> State:
        return (self.text, self.tally, *self.target, *self.draft)


def reading_unit(step: Graph, read: Read) -> Callable[..., tuple[Array, State]]:
    """Returns `prefill_unit` for a program with a drafter: the same arguments, the state being a flat `Memory`."""
    prefill, cached = prefill_unit(step), len(step.names("state"))

    def prefill_both(
        arrays: Arrays,
        logits: Array,
        tokens: Array,
        positions: Array,
        rows: Array,
        select: Array,
        finished: Array,
        state: State,
    ) -> tuple[Array, State]:
        memory = Memory.of(state, cached)
        args = {"tokens": tokens, "positions": positions, "rows": rows, "select": select}
        logits, target = prefill(arrays, logits, **args, finished=finished, state=memory.target)
        text = memory.text.at[rows, positions].set(tokens, mode="drop")
        return logits, Memory(text, memory.tally, target, read(arrays, args, memory.draft)).flat

    return prefill_both


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a round changes; output: int32 [r, unit], counts: int32 [r], tokens a row has in it."""

    rows: Rows
    output: Array
    counts: Array
    memory: Memory


@final
@dataclasses.dataclass(frozen=True)
class SpeculativeUnit:
    """`decode_unit` for a program with a drafter: called with the same arguments, the state being a flat `Memory`.

    It generates up to min(unit, limit) tokens a row: another round begins where it fits whole, and the first is cut
    where it does not. verify: a step graph of rows * (gamma + 1) tokens, all selected.
    """

    verify: Graph
    propose: Propose
    unit: int
    gamma: int
    rule: str

    def __call__(
        self, arrays: Arrays, rows: Rows, sampling: Sampling, stop_tokens: Array, limit: Array, state: State
    ) -> tuple[Array, Rows, State]:
        limit = jnp.minimum(limit, self.unit)

        def unfinished(now: _Progress) -> Array:
            ahead = jnp.where(now.rows.active, now.counts, 0).max()
            return now.rows.active.any() & (limit > 0) & ((ahead == 0) | (ahead + self.gamma < limit))

        def one_round(now: _Progress) -> _Progress:
            return self._round(arrays, sampling, stop_tokens, limit, now)

        count = rows.lengths.shape[0]
        output = jnp.full((count, self.unit), NO_TOKEN, jnp.int32)
        memory = Memory.of(state, len(self.verify.names("state")))
        end = lax.while_loop(unfinished, one_round, _Progress(rows, output, jnp.zeros_like(rows.lengths), memory))
        return end.output, end.rows, end.memory.flat

    def _round(
        self, arrays: Arrays, sampling: Sampling, stop_tokens: Array, limit: Array, now: _Progress
    ) -> _Progress:
        rows, memory, rule = now.rows, now.memory, RULES[self.rule]
        first = sample(rows.logits, sampling, rows.lengths)
        going = rows.active & ~jnp.isin(first, stop_tokens) & (rows.remaining > 1)
        text = _put(memory.text, rows.lengths, first[:, None], rows.active[:, None])
        room = jnp.minimum(rows.remaining, limit - now.counts) - 1
        drafts, draft_logits, draft = self.propose(
            arrays, text, rows.lengths, going, rule.drafting(sampling), memory.draft
        )
        fits = going[:, None] & (jnp.arange(self.gamma) < room[:, None])
        drafts = jnp.where(fits, drafts, NO_TOKEN)
        tokens = jnp.concatenate([first[:, None], drafts], axis=1)
        read = jnp.concatenate([going[:, None], drafts != NO_TOKEN], axis=1)
        logits, target = self._read(arrays, tokens, read, rows.lengths, memory.target)
        standing, following = rule.judge(logits, drafts, draft_logits, sampling, rows.lengths + 1)
        offered, kept, stopped = _cut_at_stop(drafts, standing, stop_tokens)
        offered, kept = (jnp.concatenate([rows.active[:, None], x], axis=1) for x in (offered, kept))
        new = kept.sum(-1, dtype=jnp.int32)
        remaining = rows.remaining - new
        return _Progress(
            Rows(
                jnp.where(going[:, None], following, rows.logits),
                rows.lengths + jnp.where(going, new, 0),
                going & ~stopped & (remaining > 0),
                remaining,
            ),
            _put(now.output, now.counts, tokens, kept),
            now.counts + new,
            Memory(
                _put(text, rows.lengths, tokens, kept),
                memory.tally + jnp.stack([offered, kept], axis=1),
                target,
                draft,
            ),
        )

    def _read(
        self, arrays: Arrays, tokens: Array, read: Array, lengths: Array, state: State
    ) -> tuple[Array, State]:
        """Returns the target's logits float32 [r, gamma + 1, vocab] after each token; remembers those to be read."""
        count, each = tokens.shape
        args = {
            "tokens": jnp.where(read, tokens, 0).reshape(-1),
            "positions": (lengths[:, None] + jnp.arange(each, dtype=jnp.int32)).reshape(-1),
            "rows": jnp.where(read, jnp.arange(count, dtype=jnp.int32)[:, None], count).reshape(-1),
            "select": jnp.arange(count * each, dtype=jnp.int32),
        }
        logits, state = call_step(self.verify, arrays, args, state)
        return logits.astype(jnp.float32).reshape(count, each, -1), state


def _cut_at_stop(drafts: Array, standing: Array, stop_tokens: Array) -> tuple[Array, Array, Array]:
    """Returns which drafts were offered and which are kept, bool [r, gamma], and which rows they end, bool [r].

    A stop token that stands is a row's last; what was drafted after it does not count.
    """
    stands = jnp.arange(drafts.shape[1]) < standing[:, None]
    ends = stands & jnp.isin(drafts, stop_tokens)
    open_ = jnp.cumsum(ends, axis=1) - ends == 0
    return (drafts != NO_TOKEN) & open_, stands & open_, ends.any(-1)


def _put(array: Array, first: Array, values: Array, which: Array) -> Array:
    """Returns array [r, s] with those of values [r, n] that are wanted, from place `first` [r] of each row on."""
    count, size = array.shape
    places = jnp.where(which, first[:, None] + jnp.arange(values.shape[1], dtype=jnp.int32), size)
    return array.at[jnp.arange(count)[:, None], places].set(values, mode="drop")
