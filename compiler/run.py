"""One request on its way through a compiled program, and what comes of it."""

import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.aot import STOP_TOKENS
from xlathe.decode.speculative import Memory
from xlathe.decode.text import TextStream
from xlathe.decode.units import NO_TOKEN, Rows
from xlathe.errors import XlatheError
from xlathe.request import Request
from xlathe.step import first_state
from xlathe.target import find_target

if TYPE_CHECKING:
    from xlathe.program import Program


@dataclasses.dataclass(frozen=True)
class Stats:
    """Tokens and wall-clock seconds of one call, all rows together.

    tokens_per_step: tokens that a row got each time its target ran, a stop token included; acceptance: by their place,
    how many of the drafts offered there stood (a draft after one that fell does not), () without a drafter.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_step: float = 1.0
    acceptance: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one row generated.

    tokens: the new ids, without the stop token; text: their text up to the stop string, None without a tokenizer;
    finish_reason: `stop` (a stop token or string) or `length` (max_tokens).
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    stats: Stats


@dataclasses.dataclass(frozen=True)
class Piece:
    """New tokens and text of one row, as they come."""

    row: int
    tokens: tuple[int, ...]
    text: str | None


@final
class Run:
    """One request on its way: state on the device, text on the host."""

    def __init__(self, program: "Program", request: Request) -> None:
        if not program.calls:
            raise XlatheError(
                f"this program is for {program.target} and cannot run here: save it, and load the bundle on a machine "
                f"that has one ({find_target(program.target).device})"
            )
        self.program, self.request = program, request
        self.state = first_state(program.state_avals[request.rows])
        count = len(request.prompts)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.texts: list[list[str]] = [[] for _ in range(count)]
        self.reasons: list[str | None] = [None] * count
        self.streams = [
            None if program.tokenizer is None else TextStream(program.tokenizer, stop=request.stop_strings)
            for _ in range(count)
        ]
        self.prefill_seconds = self.decode_seconds = 0.0

    def pieces(self) -> Iterator[Piece]:
        """Runs to the end; yields what each unit added."""
        rows = self._prefill()
        stops = jnp.asarray(
            [*self.request.stop_tokens, *[NO_TOKEN] * (STOP_TOKENS - len(self.request.stop_tokens))], jnp.int32
        )
        decode = self.program.calls[f"decode_r{self.request.rows}"]
        limit = jnp.asarray(self.program.buckets.unit, jnp.int32)
        while None in self.reasons:
            start = time.perf_counter()
            new, rows, self.state = decode(self.program.arrays, rows, self.request.sampling, stops, limit, self.state)
            fetched = np.asarray(new)
            self.decode_seconds += time.perf_counter() - start
            yield from self._take(fetched)
            running = [reason is None for reason in self.reasons]
            padded = running + [False] * (self.request.rows - len(running))
            rows = dataclasses.replace(rows, active=rows.active & jnp.asarray(padded))

    def completions(self) -> list[Completion]:
        """Returns what was generated, once `pieces` came to its end."""
        stats = Stats(
            sum(map(len, self.request.prompts)),
            sum(map(len, self.tokens)),
            self.prefill_seconds,
            self.decode_seconds,
            *self._drafting(),
        )
        return [
            Completion(tuple(ids), None if stream is None else "".join(parts), reason or "length", stats)
            for ids, parts, stream, reason in zip(self.tokens, self.texts, self.streams, self.reasons, strict=True)
        ]

    def _drafting(self) -> tuple[float, tuple[float, ...]]:
        """Returns tokens a step, and the acceptance by place."""
        if not self.program.buckets.gamma:
            return 1.0, ()
        offered, kept = np.asarray(Memory.of(self.state, 0).tally).sum(0)
        return float(kept.sum() / offered[0]), tuple((kept / np.maximum(offered, 1))[1:].tolist())

    def _prefill(self) -> Rows:
        """Reads all prompts as one flat list of tokens, a chunk at a time."""
        start = time.perf_counter()
        request, program = self.request, self.program
        flat = [(t, p, r) for r, ids in enumerate(request.prompts) for p, t in enumerate(ids)]
        last = {r: len(ids) - 1 for r, ids in enumerate(request.prompts)}
        logits = jnp.zeros((request.rows, program.vocab), jnp.float32)
        while flat:
            size = next((n for n in program.buckets.chunks if n >= len(flat)), program.buckets.chunks[-1])
            chunk, flat = flat[:size], flat[size:]
            select, finished = np.zeros(request.rows, np.int32), np.zeros(request.rows, bool)
            for i, (_, position, row) in enumerate(chunk):
                if position == last[row]:
                    select[row], finished[row] = i, True
            padding = [(0, 0, request.rows)] * (size - len(chunk))
            tokens, positions, rows = np.asarray([*chunk, *padding], np.int32).T
            logits, self.state = program.calls[f"prefill_r{request.rows}_n{size}"](
                program.arrays, logits, tokens, positions, rows, select, finished, self.state
            )
        jax.block_until_ready(logits)
        self.prefill_seconds = time.perf_counter() - start
        lengths = [len(ids) for ids in request.prompts] + [0] * (request.rows - len(request.prompts))
        active = jnp.arange(request.rows) < len(request.prompts)
        return Rows(
            logits, jnp.asarray(lengths, jnp.int32), active, jnp.full(request.rows, request.max_tokens, jnp.int32)
        )

    def _take(self, fetched: np.ndarray) -> Iterator[Piece]:
        """Adds a unit's tokens [rows, unit] to the rows that still run."""
        for row, reason in enumerate(self.reasons):
            if reason is not None:
                continue
            new = [int(t) for t in fetched[row] if t != NO_TOKEN]
            if not new:
                raise XlatheError(f"row {row} got no token from its program, expected 1 to {fetched.shape[1]}")
            if new[-1] in self.request.stop_tokens:
                new.pop()
                self.reasons[row] = "stop"
            elif len(self.tokens[row]) + len(new) >= self.request.max_tokens:
                self.reasons[row] = "length"
            before = len(self.tokens[row])
            self.tokens[row] += new
            text = self._text(row, new)
            yield Piece(row, tuple(self.tokens[row][before:]), text)

    def _text(self, row: int, new: list[int]) -> str | None:
        stream = self.streams[row]
        if stream is None:
            return None
        text = stream.push(new)
        if self.reasons[row] is not None and stream.stopped is None:
            text += stream.finish()
        if stream.stopped is not None:
            self.reasons[row] = "stop"
            del self.tokens[row][stream.taken :]
        self.texts[row].append(text)
        return text
