"""A compiled model: requests in, text out. The host only feeds chunks, checks stop strings and streams."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from xlathe.aot import (
    CHUNKS,
    STOP_TOKENS,
    UNIT,
    Buckets,
    find_speculation,
    served_arrays,
    served_state,
    to_step,
    units,
)
from xlathe.card import Card
from xlathe.chat import Messages, encode_chat, end_of_turn
from xlathe.decode.drafters import Drafter
from xlathe.decode.speculative import Memory, Speculation
from xlathe.decode.text import TextStream
from xlathe.decode.units import NO_TOKEN, Rows
from xlathe.errors import OptionError, RequestError, XlatheError
from xlathe.graph import Graph, check_graph
from xlathe.integers import as_integer
from xlathe.memory import MemoryPlan, plan_from_graph
from xlathe.offline import plan_for, runs_here, target_here
from xlathe.request import Limits, Prompts, Request, Stops
from xlathe.step import first_state
from xlathe.target import Target, find_target


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
@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Programs compiled for some buckets of sizes, and the weights that they share.

    calls: the compiled units by name (`aot.units`), none where they are for another machine; step and speculation: the
    graph they were compiled from and how they draft, None where the program was loaded from disk; target: what they
    were compiled for; memory: what they take of it; seconds: how long compiling or loading took; card: what the model's
    checkpoint said, None where it was none.
    """

    calls: Mapping[str, Callable[..., Any]]
    arrays: Mapping[str, jax.Array]
    state_avals: Mapping[int, Mapping[str, Any]]  # by number of rows, by name
    buckets: Buckets
    vocab: int
    memory: MemoryPlan
    tokenizer: Any = None
    stop_tokens: tuple[int, ...] = ()
    step: Graph | None = None
    speculation: Speculation | None = None
    target: str = "cpu"
    seconds: float = 0.0
    card: Card | None = None

    def generate(
        self,
        prompt: Prompts,
        max_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        stop: Stops = None,
    ) -> list[Completion]:
        """Generates for each row of a prompt; returns one completion a row.

        prompt: a string, a list of strings, or token ids (integers [b, t] or lists of different lengths).
        max_tokens: of every row. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; all of these and seed
        may be one a row. stop: a string, a token id, or several of them, that end a row; the program's own stop
        tokens always do.

        Raises RequestError where the request does not fit: prompts that are empty or no text or ids, ids outside the
        vocabulary, too many rows, or more tokens than the compiled length. OptionError for sampling options out of
        range. XlatheError where the program is for another machine.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        run = _Run(self, self.limits.request(prompt, max_tokens, stop, **options))
        for _ in run.pieces():
            pass
        return run.completions()

    def stream(
        self, prompt: Prompts, max_tokens: int = 64, *, stop: Stops = None, **sampling: Any
    ) -> Iterator[Piece]:
        """Returns the same tokens and text as `generate` in pieces, one a row after every compiled unit.

        The request is checked at once, as by `generate`, and served while the pieces are taken.
        """
        return _Run(self, self.limits.request(prompt, max_tokens, stop, **sampling)).pieces()

    def chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        *,
        tools: Sequence[Any] | None = None,
        stop: Stops = None,
        **sampling: Any,
    ) -> Completion:
        """Answers a conversation: its prompt is what the model's own chat template makes of the messages.

        messages: mappings with `role` and `content`, as Hugging Face and OpenAI write them; tools: JSON schemas of
        functions, for templates that know them; max_tokens: of the answer, None is as many as the compiled length
        leaves; stop and sampling: as of `generate`.

        Raises RequestError where the model has no chat template or the template refuses the messages, and as `generate`
        does.
        """
        run = self._chat(messages, max_tokens, tools, stop, sampling)
        for _ in run.pieces():
            pass
        return run.completions()[0]

    def stream_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        *,
        tools: Sequence[Any] | None = None,
        stop: Stops = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Returns the same answer as `chat` in pieces; the request is checked at once."""
        return self._chat(messages, max_tokens, tools, stop, sampling).pieces()

    def _chat(
        self, messages: Messages, max_tokens: int | None, tools: Any, stop: Stops, sampling: Mapping[str, Any]
    ) -> "_Run":
        ids = encode_chat(self.card, self.tokenizer, messages, tools)
        count = max(1, self.buckets.slots - len(ids)) if max_tokens is None else max_tokens
        ends = dict.fromkeys((*self.stop_tokens, *end_of_turn(self.card, self.tokenizer)))
        limits = dataclasses.replace(self.limits, stop_tokens=tuple(ends))
        return _Run(self, limits.request([ids], count, stop, **sampling))

    @property
    def limits(self) -> Limits:
        """What requests must fit."""
        return Limits(self.buckets, self.vocab, self.tokenizer, self.stop_tokens)

    def save(self, directory: Any) -> None:
        """Writes a bundle that `xlathe.load` serves without the model's source; see `xlathe.bundle`."""
        from xlathe.bundle import save_bundle

        save_bundle(self, directory)


def compile(
    graph: Graph,
    *,
    max_batch: int = 1,
    max_len: int | None = None,
    target: str | None = None,
    unit: int = UNIT,
    chunks: Sequence[int] = CHUNKS,
    stop_tokens: Sequence[int] | None = None,
    draft: Graph | Drafter | str | None = None,
    gamma: int = 4,
    rule: str = "match",
) -> Program:
    """Compiles a graph for serving.

    graph: a step graph, or a forward graph from which the step is derived with the default passes. max_batch: the
    most rows at once; max_len: the most tokens a row, prompt and answer (default: the graph's). target: a name from
    `xlathe.target`; None is the device of this process. Programs for another device are made to be saved; they are
    compiled too where its real compiler is installed (`xlathe.offline`), and `memory` says what they take. unit: tokens
    generated between two looks of the host. chunks: prompt tokens read at once. stop_tokens: ids that end a row of
    every request; None is those of the graph's card.

    draft: proposes tokens that the target verifies, gamma at once: a graph with the same vocabulary, or `ngram` for
    `xlathe.decode.drafters.NGram()`, which looks them up in the text so far, or any other
    `Drafter`. rule: `match` gives the text that plain decoding gives, `ratio` text of the same law; see
    `xlathe.decode.accept`.

    Raises OptionError for what is no graph, for sizes that are no positive integers of 32 bits, for an unknown target,
    and for a draft that does not go with the graph; RequestError for a max_len beyond the graph's, DeriveError where no
    step can be derived, XlatheError where the compiler of another device refuses a program. A program that does not fit
    its device is a warning.
    """
    start = time.perf_counter()
    check_graph(graph, "compile")
    machine = target_here() if target is None else find_target(target)
    slots = graph.max_len if max_len is None else max_len
    buckets = Buckets.of(max_batch, slots, unit, chunks, None if draft is None else gamma)
    if buckets.slots > graph.max_len:
        raise RequestError(f"max_len={max_len}, but the graph was traced with max_len={graph.max_len}")
    stops = _stops_of(graph.card, graph.vocab) if stop_tokens is None else _checked_stops(stop_tokens, graph.vocab)
    speculation = find_speculation(graph, draft, rule, buckets)
    step = to_step(graph)
    calls, memory = _compiled(step, buckets, machine, speculation)
    if not memory.fits:
        logging.warning("%s", memory.shortage)
    return Program(
        calls=calls,
        arrays=served_arrays(step, speculation),
        state_avals={r: served_state(step, buckets, r, speculation) for r in buckets.batches},
        buckets=buckets,
        vocab=step.vocab,
        tokenizer=graph.tokenizer,
        stop_tokens=stops,
        step=step,
        speculation=speculation,
        target=machine.name,
        memory=memory,
        seconds=time.perf_counter() - start,
        card=graph.card,
    )


def _compiled(
    step: Graph, buckets: Buckets, target: Target, speculation: Speculation | None
) -> tuple[Mapping[str, Callable[..., Any]], MemoryPlan]:
    """Returns the compiled units by name, none where the target is another machine, and what they take."""
    if not runs_here(target):
        return {}, plan_for(step, buckets, target, speculation)
    built = [
        (u.signature, compile_unit(u.function, u.signature.avals))
        for u in units(step, buckets, target.name, speculation=speculation)
    ]
    plan = plan_from_graph(step, buckets, target, speculation).with_temporaries(built)
    return {signature.name: call for signature, call in built}, plan


def _stops_of(card: Card | None, vocab: int) -> tuple[int, ...]:
    """Returns the stop tokens of a card that the model can generate; others end nothing, as -1 where there is none."""
    return _checked_stops([] if card is None else [i for i in card.stop_tokens if 0 <= i < vocab], vocab)


def _checked_stops(stop_tokens: Sequence[int], vocab: int) -> tuple[int, ...]:
    ids = [as_integer(x) for x in stop_tokens] if isinstance(stop_tokens, Iterable) else [None]
    checked = tuple(i for i in ids if i is not None and 0 <= i < vocab)
    if len(checked) < len(ids) or len(ids) > STOP_TOKENS:
        raise OptionError(
            f"compile: stop_tokens must be at most {STOP_TOKENS} token ids 0..{vocab - 1}, got {stop_tokens!r}"
        )
    return checked


def compile_unit(function: Callable[..., Any], avals: tuple[Any, ...]) -> jax.stages.Compiled:
    """Compiles a unit; its last argument, the cache, is updated in place."""
    return jax.jit(function, donate_argnums=(len(avals) - 1,)).lower(*avals).compile()


class _Run:
    """One request on its way: state on the device, text on the host."""

    def __init__(self, program: Program, request: Request) -> None:
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
