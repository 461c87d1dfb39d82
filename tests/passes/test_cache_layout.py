"""The contract of a cache's layout: any chunking and any mixture of rows equals the full forward, as before."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from tests.passes.decoding import CHUNK, decode, difference, feed, fused, stepped
from tests.variants import DECODERS, forward
from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.ops.attention import attention
from xlathe.ops.cached_attention import cached_attention
from xlathe.ops.write_slots import quantize_heads
from xlathe.parser import parse
from xlathe.passes import PASSES
from xlathe.passes.cache_layout import CacheLayout
from xlathe.passes.specialize import Specialize
from xlathe.pipeline import Pipeline
from xlathe.printer import to_text
from xlathe.program import Program
from xlathe.step import TABLE, State, first_state, run_step, state_avals

VARIANTS = {variant.name: variant for variant in DECODERS}
LENGTHS, ROWS, SLOTS, COUNT = (45, 31, 9), [2, 0, 3], 48, 5
RING = CacheLayout("ring", slack=CHUNK)
PAGED = CacheLayout("paged", page=8)
INT8 = CacheLayout(dtype="int8")


def in_8_bits(layout: CacheLayout) -> CacheLayout:
    return dataclasses.replace(layout, dtype="int8")


@functools.cache
def derived(name: str) -> Graph:
    return stepped(VARIANTS[name])


@functools.cache
def laid_out(name: str, layout: CacheLayout) -> Graph:
    return layout(derived(name))


def texts(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VARIANTS[name].vocab, n) for n in LENGTHS]


def mixed_schedule() -> list[dict[int, int]]:
    """Chunks of 1 to 8 tokens of one to three texts, until all are read."""
    rng, left, calls = np.random.default_rng(2), list(LENGTHS), []
    while any(left):
        call: dict[int, int] = {}
        for text in rng.permutation(3)[: rng.integers(1, 4)].tolist():
            count = min(left[text], int(rng.integers(1, CHUNK + 1)), CHUNK - sum(call.values()))
            call |= {text: count} if count else {}
            left[text] -= count
        calls += [call] if call else []
    return calls


def unused(graph: Graph) -> State:
    """States full of what must never be read: NaN, the largest codes, pages in no order; row 4 has no pages.

    Three pages more than the rows need belong to nobody.
    """
    pages = SLOTS // PAGED.page
    sizes = {"r": COUNT, "s": SLOTS, "c": pages, "p": COUNT * pages + 3}
    states = []
    for name in graph.names("state"):
        aval = graph.aval(name)
        shape = ir.substitute(tuple(aval.shape), sizes)
        states.append(jnp.full(shape, np.nan if jnp.issubdtype(aval.dtype, jnp.floating) else 127, aval.dtype))
    if TABLE in graph.names("state"):
        table = np.random.default_rng(3).permutation(sizes["p"])[: COUNT * pages].reshape(COUNT, pages)
        table[4] = [-1, sizes["p"], 10**6, -7, -1, -1]
        states[-1] = jnp.asarray(table, jnp.int32)
    return tuple(states)


@functools.cache
def rounded_forward(name: str) -> Any:
    """The forward with the keys and values of every attention rounded to 8 bits a token and head, written out."""
    graph = fused(VARIANTS[name])
    arrays = graph.arrays

    def rounded(x: jax.Array) -> jax.Array:  # [b, s, k, d]
        step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return jnp.round(x / step) * step

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        if not ir.is_op(eqn, "attention"):
            return None
        q, keys, values, *terms = operands
        return [attention(q, rounded(keys), rounded(values), *terms, **ir.attributes(eqn))]

    def run(tokens: jax.Array) -> jax.Array:
        sizes = {"b": tokens.shape[0], "t": tokens.shape[1]}
        return ir.evaluate_at(graph.jaxpr, graph.bind_names({**arrays, "tokens": tokens}), sizes, rule)[0]

    return jax.jit(run)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("window_7", RING),
        ("window_16", RING),
        ("window_and_global", RING),
        ("window_7", PAGED),
        ("repeat_gqa", PAGED),
        ("alibi_keys", PAGED),
        ("window_7", CacheLayout()),
    ],
    ids=str,
)
def test_any_mixture_of_rows_equals_the_forward(name: str, layout: CacheLayout) -> None:
    graph, oracle = laid_out(name, layout), forward(VARIANTS[name])
    found = decode(graph, texts(name), mixed_schedule(), ROWS, SLOTS, unused(graph))
    for text, logits in zip(texts(name), found, strict=True):
        assert difference(logits, oracle(text[None])[0]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "layout"),
    [("window_7", RING), ("window_and_global", RING), ("repeat_gqa", PAGED), ("alibi_keys", PAGED), ("repeat_gqa", INT8)],
    ids=str,
)
def test_8_bits_are_those_of_a_forward_with_rounded_keys_and_values(name: str, layout: CacheLayout) -> None:
    graph, oracle = laid_out(name, in_8_bits(layout)), rounded_forward(name)
    found = decode(graph, texts(name), mixed_schedule(), ROWS, SLOTS, unused(graph))
    for text, logits in zip(texts(name), found, strict=True):
        print(difference(logits, oracle(text[None])[0]), difference(logits, forward(VARIANTS[name])(text[None])[0]))
