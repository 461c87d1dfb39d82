"""Compile a graph ahead of time: one program a bucket of sizes, all over the same weights."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xlathe.decode.accept import RULES
from xlathe.decode.drafters import Drafter, DraftModel, Fix, NGram
from xlathe.decode.logits import Sampling
from xlathe.decode.speculative import Memory, Speculation, SpeculativeUnit, reading_unit
from xlathe.decode.units import Rows, decode_unit, prefill_unit
from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph
from xlathe.integers import as_integer
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.specialize import Specialize
from xlathe.stacks import stack_weights
from xlathe.step import cache_sizes, ring_slack, state_avals

UNIT, CHUNKS = 32, (16, 128)  # what `xlathe.compile` takes for them
STOP_TOKENS = 8  # stop token ids that a program takes; unused places hold -1

_LARGEST = 2**31 - 1  # positions, rows and counts of tokens are int32
_CACHE_SIZES = {"r": "rows", "s": "slots", "p": "pages", "c": "row_pages"}  # how `Specialize` calls them


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for.

    batches: numbers of rows; chunks: prompt tokens a prefill call reads; unit: tokens a decode call generates at
    most; slots: tokens a row can hold, prompt and answer; gamma: tokens drafted at once, 0 without a drafter.
    """

    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    unit: int
    slots: int
    gamma: int = 0

    @property
    def programs(self) -> int:
        """How many programs that is: for each batch, one decode loop and one prefill a chunk."""
        return len(self.batches) * (1 + len(self.chunks))

    @staticmethod
    def of(max_batch: int, max_len: int, unit: int, chunks: Sequence[int], gamma: int | None = None) -> "Buckets":
        """Returns batches 1 and max_batch, and chunks no longer than a row; OptionError for what is no size."""
        rows, slots, tokens = (
            _size(name, value) for name, value in (("max_batch", max_batch), ("max_len", max_len), ("unit", unit))
        )
        if not isinstance(chunks, Iterable) or not (sizes := [_size("a chunk", chunk) for chunk in chunks]):
            raise OptionError(f"compile: chunks must be a list of sizes, got {chunks!r}")
        drafted = 0 if gamma is None else _size("gamma", gamma)
        fitting = {min(size, slots * rows) for size in sizes}
        return Buckets(tuple(sorted({1, rows})), tuple(sorted(fitting)), tokens, slots, drafted)


@dataclasses.dataclass(frozen=True)
class Signature:
    """Arguments (the weights come first, the state last) and results of one program, as avals."""

    name: str
    avals: tuple[Any, ...]
    results: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One program to compile: a pure function and its signature."""

    signature: Signature
    function: Callable[..., Any]


def to_step(graph: Graph) -> Graph:
    """Returns the incremental step of a graph, derived with the default passes where it still is a forward."""
    for pass_ in () if graph.is_step else (Canonicalize(), FuseAttention(), KVCache()):
        graph = pass_(graph)
    return stack_weights(graph)


def fix_step(
    step: Graph, target: str, rows: int, slots: int, tokens: int, selected: int, *, kernels: bool = True
) -> Graph:
    """Returns a step graph for so many rows of so many slots, and tokens a call; kernels: as for `units`."""
    sizes = {_CACHE_SIZES[name]: size for name, size in cache_sizes(step, rows, slots).items()}
    fixed = Specialize(tokens=tokens, selected=selected, **sizes)(step)
    return LowerKernels(target)(fixed) if kernels else fixed


def find_speculation(
    graph: Graph, draft: Graph | Drafter | str | None, rule: str, buckets: Buckets
) -> Speculation | None:
    """Returns how a program of a graph drafts; see `xlathe.compile`."""
    if draft is None:
        return None
    if rule not in RULES:
        raise OptionError(f"compile: no rule {rule!r}{did_you_mean(str(rule), RULES)}")
    if buckets.gamma >= buckets.slots:
        raise OptionError(
            f"compile: gamma={buckets.gamma} drafts and the token before them do not fit max_len={buckets.slots}"
        )
    if isinstance(draft, Graph):
        _check_draft(graph, draft, buckets)
        return Speculation(DraftModel(to_step(draft)), rule)
    drafter = NGram() if isinstance(draft, str) and draft == "ngram" else draft
    if not isinstance(drafter, Drafter):
        raise OptionError(f"compile: draft must be a graph, 'ngram' or a Drafter, got {draft!r}")
    return Speculation(drafter, rule)


def _check_draft(graph: Graph, draft: Graph, buckets: Buckets) -> None:
    if draft.vocab != graph.vocab:
        raise OptionError(f"compile: the draft has a vocabulary of {draft.vocab} tokens, the target of {graph.vocab}")
    tokenizers = [t for t in (graph.tokenizer, draft.tokenizer) if t is not None]
    if len(tokenizers) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise OptionError("compile: the tokenizers of draft and target give tokens other ids")
    if draft.max_len < buckets.slots:
        raise OptionError(f"compile: max_len={buckets.slots}, but the draft was traced with max_len={draft.max_len}")


def served_arrays(step: Graph, speculation: Speculation | None) -> dict[str, jax.Array]:
    """Returns the arrays that programs take: those of the target and of its drafter."""
    return {**step.arrays, **(speculation.drafter.arrays if speculation else {})}


def served_avals(step: Graph, speculation: Speculation | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of `served_arrays`; the weights of the target may be shapes without values."""
    own = {name: _aval(step.aval(name)) for name in step.names("weight", "const")}
    return own | {name: _aval(array) for name, array in (speculation.drafter.arrays if speculation else {}).items()}


def served_state(step: Graph, buckets: Buckets, rows: int, speculation: Speculation | None) -> dict[str, Any]:
    """Returns the avals of what programs remember between calls, by name, in the order of their state."""
    caches = dict(zip(step.names("state"), state_avals(step, rows, buckets.slots), strict=True))
    if speculation is None:
        return caches
    own = Memory.types(rows, buckets.slots, buckets.gamma)
    return own | caches | speculation.drafter.state_types(rows, buckets.slots)


def units(
    step: Graph,
    buckets: Buckets,
    target: str,
    *,
    kernels: bool = True,
    speculation: Speculation | None = None,
) -> Iterator[Unit]:
    """Yields every program of a step graph.

    kernels: False keeps the reference bodies, for machines that lack the kernels.
    """
    weights = served_avals(step, speculation)
    for r in buckets.batches:

        def fix(graph: Graph, *, tokens: int, selected: int, rows: int = r) -> Graph:
            _check_rings(graph, buckets)
            return fix_step(graph, target, rows, buckets.slots, tokens, selected, kernels=kernels)

        state = tuple(served_state(step, buckets, r, speculation).values())
        decode = decode_signature(r, buckets.unit, step.vocab, weights, state)
        yield Unit(decode, _decoding(step, buckets, fix, r, speculation))
        for n in buckets.chunks:
            prefill = prefill_signature(r, n, step.vocab, weights, state)
            yield Unit(prefill, _reading(step, fix, r, n, speculation))


def _check_rings(step: Graph, buckets: Buckets) -> None:
    slack = ring_slack(step)
    needed = min(max(*buckets.chunks, buckets.gamma + 1), buckets.slots)
    if slack is not None and needed > slack:
        raise OptionError(
            f"compile: a call brings up to {needed} tokens of a row (chunks={buckets.chunks}, gamma={buckets.gamma}), "
            f"but the rings of the cache have room for {slack}: use smaller chunks, or CacheLayout(slack={needed})"
        )


def _decoding(
    step: Graph, buckets: Buckets, fix: Fix, rows: int, speculation: Speculation | None
) -> Callable[..., Any]:
    if speculation is None:
        return decode_unit(fix(step, tokens=rows, selected=rows), buckets.unit)
    count = rows * (buckets.gamma + 1)
    propose = speculation.drafter.proposer(fix, rows, step.vocab, buckets.gamma)
    verify = fix(step, tokens=count, selected=count)
    return SpeculativeUnit(verify, propose, buckets.unit, buckets.gamma, speculation.rule)


def _reading(step: Graph, fix: Fix, rows: int, tokens: int, speculation: Speculation | None) -> Callable[..., Any]:
    fixed = fix(step, tokens=tokens, selected=rows)
    return reading_unit(fixed, speculation.drafter.reader(fix, rows, tokens)) if speculation else prefill_unit(fixed)


def signatures(
    buckets: Buckets, vocab: int, weights: Mapping[str, Any], states: Mapping[int, tuple[Any, ...]]
) -> Iterator[Signature]:
    """Yields the signatures of `units`, in their order, from avals alone; states: by number of rows."""
    for r in buckets.batches:
        yield decode_signature(r, buckets.unit, vocab, weights, states[r])
        for n in buckets.chunks:
            yield prefill_signature(r, n, vocab, weights, states[r])


def decode_signature(
    rows: int, unit: int, vocab: int, weights: Mapping[str, Any], state: tuple[Any, ...]
) -> Signature:
    """`decode_r<rows>`: see `xlathe.decode.units.decode_unit`."""
    progress = Rows(_floats(rows, vocab), _ints(rows), _bools(rows), _ints(rows))
    keys: Any = jax.ShapeDtypeStruct((rows, 2), jnp.uint32)
    sampling = Sampling(_floats(rows), _ints(rows), _floats(rows), _floats(rows), keys)
    avals = (dict(weights), progress, sampling, _ints(STOP_TOKENS), _ints(), state)
    return Signature(f"decode_r{rows}", avals, (_ints(rows, unit), progress, state))


def prefill_signature(
    rows: int, tokens: int, vocab: int, weights: Mapping[str, Any], state: tuple[Any, ...]
) -> Signature:
    """`prefill_r<rows>_n<tokens>`: see `xlathe.decode.units.prefill_unit`."""
    logits, each, chosen = _floats(rows, vocab), _ints(tokens), _ints(rows)
    avals = (dict(weights), logits, each, each, each, chosen, _bools(rows), state)
    return Signature(f"prefill_r{rows}_n{tokens}", avals, (logits, state))


def _size(name: str, value: Any) -> int:
    size = as_integer(value)
    if size is None or size < 1:
        raise OptionError(f"compile: {name} must be an integer of at least 1, got {value!r}")
    if size > _LARGEST:
        raise OptionError(f"compile: {name} must be at most {_LARGEST}, got {size}")
    return size


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bools(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def _aval(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
