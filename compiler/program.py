"""A compiled model: requests in, text out. The host only feeds chunks, checks stop strings and streams."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.aot import STOP_TOKENS, Buckets, units
from xlathe.decode.logits import Sampling
from xlathe.decode.text import TextStream
from xlathe.decode.units import NO_TOKEN, Rows
from xlathe.errors import RequestError
from xlathe.graph import Graph
from xlathe.target import find_target

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Stats:
    """Tokens and wall-clock seconds of one call, all rows together."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float


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


@dataclasses.dataclass(frozen=True)
class _Request:
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    rows: int  # of the program that serves it


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Programs compiled for some buckets of sizes, and the weights that they share.

    calls: the compiled units by name (`aot.units`); step: the graph they were compiled from, None where the program
    was loaded from disk; target: what they were compiled for; seconds: how long compiling or loading took.
    """

    calls: Mapping[str, Callable[..., Any]]
    arrays: Mapping[str, jax.Array]
    state_avals: Mapping[int, tuple[Any, ...]]  # by number of rows
    buckets: Buckets
    vocab: int
    tokenizer: Any = None
    stop_tokens: tuple[int, ...] = ()
    step: Graph | None = None
    target: str = "cpu"
    seconds: float = 0.0

    def generate(
        self,
        prompt: Prompts,
        max_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | int | Sequence[str | int] = (),
    ) -> list[Completion]:
        """Generates for each row of a prompt; returns one completion a row.

        prompt: a string, a list of strings, or token ids (int32 [b, t] or lists of different lengths).
        temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; all of these and seed may be one a row.
        stop: strings or token ids that end a row; the program's own stop tokens always do.

        Raises RequestError where the request does not fit: empty prompts, ids outside the vocabulary, too many rows,
        or more tokens than the compiled length. OptionError for sampling options out of range.
        """
        run = _Run(self, self._request(prompt, max_tokens, temperature, top_k, top_p, min_p, seed, stop))
        for _ in run.pieces():
            pass
        return run.completions()

    def stream(self, prompt: Prompts, max_tokens: int = 64, **options: Any) -> Iterator[Piece]:
        """Yields the same tokens and text as `generate` in pieces, after every compiled unit."""
        yield from _Run(self, self._request(prompt, max_tokens, **options)).pieces()

    def save(self, directory: Any) -> None:
        """Writes a bundle that `xlathe.load` serves without the model's source; see `xlathe.bundle`."""
        from xlathe.bundle import save_bundle

        save_bundle(self, directory)

    def _request(
        self,
        prompt: Prompts,
        max_tokens: int,
        temperature: Any = 0.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        seed: Any = 0,
        stop: str | int | Sequence[str | int] = (),
    ) -> _Request:
        prompts = self._token_ids(prompt)
        rows = self._bucket(len(prompts))
        self._check_lengths(prompts, max_tokens)
        stops = [stop] if isinstance(stop, str | int) else list(stop)
        stop_tokens = (*self.stop_tokens, *(s for s in stops if not isinstance(s, str)))
        if len(stop_tokens) > STOP_TOKENS:
            raise RequestError(f"{len(stop_tokens)} stop tokens, but a program takes at most {STOP_TOKENS}")
        sampling = Sampling.of(len(prompts), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        strings = tuple(s for s in stops if isinstance(s, str))
        if strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this program has none; use stop token ids")
        return _Request(prompts, max_tokens, _padded(sampling, rows), stop_tokens, strings, rows)

    def _token_ids(self, prompt: Prompts) -> tuple[tuple[int, ...], ...]:
        if isinstance(prompt, str):
            prompt = [prompt]
        rows = list(prompt)
        if not rows:
            raise RequestError("no prompt was given")
        if all(isinstance(row, str) for row in rows):
            if self.tokenizer is None:
                raise RequestError("this program has no tokenizer; give token ids instead of text")
            rows = [self.tokenizer.encode(row, add_special_tokens=False).ids for row in rows]
        result = []
        for i, row in enumerate(rows):
            ids = np.asarray(row)
            if ids.ndim != 1 or not ids.size:
                raise RequestError(f"prompt {i} is empty or no list of token ids")
            if ids.dtype.kind not in "iu":
                raise RequestError(f"prompt {i} holds {ids.dtype}, expected strings or integer token ids")
            outside = ids[(ids < 0) | (ids >= self.vocab)]
            if outside.size:
                raise RequestError(f"prompt {i} has token id {outside[0]}, outside the vocabulary 0..{self.vocab - 1}")
            result.append(tuple(int(x) for x in ids))
        return tuple(result)

    def _bucket(self, count: int) -> int:
        fitting = [r for r in self.buckets.batches if r >= count]
        if not fitting:
            raise RequestError(f"{count} rows, but the program was compiled with max_batch={max(self.buckets.batches)}")
        return min(fitting)

    def _check_lengths(self, prompts: tuple[tuple[int, ...], ...], max_tokens: int) -> None:
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {max_tokens}")
        longest = max(map(len, prompts))
        needed = longest + max_tokens
        if needed > self.buckets.slots:
            raise RequestError(
                f"a prompt of {longest} tokens and max_tokens={max_tokens} need {needed} positions, but the program "
                f"was compiled with max_len={self.buckets.slots}"
            )


def compile(
    graph: Graph,
    *,
    max_batch: int = 1,
    max_len: int | None = None,
    target: str | None = None,
    unit: int = 32,
    chunks: Sequence[int] = (16, 128),
    stop_tokens: Sequence[int] = (),
) -> Program:
    """Compiles a graph for serving.

    graph: a step graph, or a forward graph from which the step is derived with the default passes. max_batch: the
    most rows at once; max_len: the most tokens a row, prompt and answer (default: the graph's). target: a name from
    `xlathe.target`. unit: tokens generated between two looks of the host. chunks: prompt tokens read at once.
    """
    from xlathe.aot import to_step
    from xlathe.step import state_avals

    start = time.perf_counter()
    if max_len is not None and max_len > graph.max_len:
        raise RequestError(f"max_len={max_len}, but the graph was traced with max_len={graph.max_len}")
    step = to_step(graph)
    buckets = Buckets.of(max_batch, max_len or graph.max_len, unit, chunks)
    calls = {u.signature.name: compile_unit(u.function, u.signature.avals) for u in units(step, buckets, target)}
    return Program(
        calls=calls,
        arrays=step.arrays,
        state_avals={r: tuple(state_avals(step, r, buckets.slots)) for r in buckets.batches},
        buckets=buckets,
        vocab=step.vocab,
        tokenizer=graph.tokenizer,
        stop_tokens=tuple(stop_tokens),
        step=step,
        target=find_target(target).name,
        seconds=time.perf_counter() - start,
    )


def compile_unit(function: Callable[..., Any], avals: tuple[Any, ...]) -> Callable[..., Any]:
    """Compiles a unit; its last argument, the cache, is updated in place."""
    return jax.jit(function, donate_argnums=(len(avals) - 1,)).lower(*avals).compile()


def _padded(sampling: Sampling, rows: int) -> Sampling:
    """Repeats the first row's options for rows that nobody asked for."""
    missing = rows - sampling.temperature.shape[0]
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)]), sampling)


class _Run:
    """One request on its way: state on the device, text on the host."""

    def __init__(self, program: Program, request: _Request) -> None:
        self.program, self.request = program, request
        self.state = tuple(jnp.zeros(a.shape, a.dtype) for a in program.state_avals[request.rows])
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
            sum(map(len, self.request.prompts)), sum(map(len, self.tokens)), self.prefill_seconds, self.decode_seconds
        )
        return [
            Completion(tuple(ids), None if stream is None else "".join(parts), reason or "length", stats)
            for ids, parts, stream, reason in zip(self.tokens, self.texts, self.streams, self.reasons, strict=True)
        ]

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
            if new and new[-1] in self.request.stop_tokens:
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
