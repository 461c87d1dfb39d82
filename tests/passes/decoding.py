"""How the tests of step graphs run them: any mixture of rows and chunks, in one compiled shape."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen, nnx

import xlathe
from tests import graphs
from tests.variants import Variant
from xlathe.graph import Graph
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.step import State, empty_state, run_step

CHUNK = 8  # tokens a call; shorter mixtures are padded, so that a step graph is compiled once
Piece = tuple[int, int, int]  # token, position, row


@functools.cache
def traced(variant: Variant) -> Graph:
    model = variant.build()
    if isinstance(model, nnx.Module) or isinstance(model[0], linen.Module):
        return xlathe.trace(model, max_len=variant.max_len)
    return graphs.traced(variant.name)


@functools.cache
def fused(variant: Variant) -> Graph:
    return FuseAttention()(Canonicalize()(traced(variant)))


@functools.cache
def stepped(variant: Variant) -> Graph:
    return KVCache()(fused(variant))


def decode(
    graph: Graph,
    texts: Sequence[np.ndarray],
    schedule: Sequence[dict[int, int]],
    rows: Sequence[int],
    slots: int,
    state: State | None = None,
) -> list[np.ndarray]:
    """Feeds `schedule[i][text]` tokens of each text in call i; returns the logits of every text [length, vocab].

    rows: the row of the cache that each text lives in. state: what the cache holds before, of max(rows) + 2 rows; by
    default NaN.
    """
    count = max(rows) + 2
    state = empty_state(graph, count, slots, fill=np.nan) if state is None else state
    done = [0] * len(texts)
    logits: list[list[np.ndarray]] = [[] for _ in texts]
    for call in schedule:
        pieces = [(i, done[i] + j) for i, n in call.items() for j in range(n)]
        output, state = feed(graph, [(int(texts[i][p]), p, rows[i]) for i, p in pieces], count, state)
        for (i, _), row in zip(pieces, output, strict=True):
            logits[i].append(row)
        for i, n in call.items():
            done[i] += n
    assert done == [len(text) for text in texts]
    return [np.stack(parts) for parts in logits]


def feed(graph: Graph, pieces: Sequence[Piece], count: int, state: State) -> tuple[np.ndarray, State]:
    """Makes one call, padded to CHUNK tokens; returns the logits after each piece, and the state of `count` rows."""
    assert len(pieces) <= CHUNK
    padded = [*pieces, *[(0, 0, count)] * (CHUNK - len(pieces))]
    args = dict(zip(("tokens", "positions", "rows"), np.asarray(padded, np.int32).T, strict=True))
    logits, state = run_step(graph, args | {"select": np.arange(CHUNK, dtype=np.int32)}, state)
    return np.asarray(logits, np.float32)[: len(pieces)], state


def in_one_batch(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Pads texts to one length: an oracle is compiled once, and what follows a text does not change its logits."""
    longest = max(map(len, texts))
    return np.stack([np.pad(text, (0, longest - len(text))) for text in texts]).astype(np.int32)


def difference(found: jax.Array, expected: jax.Array) -> float:
    """max |difference| over max |expected|; NaN where anything is NaN."""
    a, b = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.abs(a - b).max() / np.abs(b).max())
