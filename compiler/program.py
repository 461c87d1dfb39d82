"""A compiled model: requests in, text out. The host only feeds chunks, checks stop strings and streams."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import jax
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
from xlathe.decode.speculative import Speculation
from xlathe.errors import OptionError, RequestError
from xlathe.graph import Graph, check_graph
from xlathe.integers import as_integer
from xlathe.memory import MemoryPlan, plan_from_graph
from xlathe.offline import plan_for, runs_here, target_here
from xlathe.request import Limits, Prompts, Stops
from xlathe.run import Completion, Piece, Run
from xlathe.run import Stats as Stats
from xlathe.target import Target, find_target


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
        run = Run(self, self.limits.request(prompt, max_tokens, stop, **options))
        for _ in run.pieces():
            pass
        return run.completions()

    def stream(
        self, prompt: Prompts, max_tokens: int = 64, *, stop: Stops = None, **sampling: Any
    ) -> Iterator[Piece]:
        """Returns the same tokens and text as `generate` in pieces, one a row after every compiled unit.

        The request is checked at once, as by `generate`, and served while the pieces are taken.
        """
        return Run(self, self.limits.request(prompt, max_tokens, stop, **sampling)).pieces()

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
    ) -> Run:
        ids = encode_chat(self.card, self.tokenizer, messages, tools)
        count = max(1, self.buckets.slots - len(ids)) if max_tokens is None else max_tokens
        ends = dict.fromkeys((*self.stop_tokens, *end_of_turn(self.card, self.tokenizer)))
        limits = dataclasses.replace(self.limits, stop_tokens=tuple(ends))
        return Run(self, limits.request([ids], count, stop, **sampling))

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
