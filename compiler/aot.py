"""Compile a graph ahead of time: one program a bucket of sizes, all over the same weights."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xlathe.decode.logits import Sampling
from xlathe.decode.units import Rows, decode_unit, prefill_unit
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.specialize import Specialize
from xlathe.step import state_avals
from xlathe.target import find_target

STOP_TOKENS = 8  # stop token ids that a program takes; unused places hold -1


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for.

    batches: numbers of rows; chunks: prompt tokens a prefill call reads; unit: tokens a decode call generates at
    most; slots: tokens a row can hold, prompt and answer.
    """

    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    unit: int
    slots: int

    @staticmethod
    def of(max_batch: int, max_len: int, unit: int, chunks: Sequence[int]) -> "Buckets":
        """Returns batches 1 and max_batch, and chunks no longer than a row."""
        for name, value in (("max_batch", max_batch), ("unit", unit), ("max_len", max_len)):
            if value < 1:
                raise OptionError(f"compile: {name} must be at least 1, got {value}")
        if not chunks or min(chunks) < 1:
            raise OptionError(f"compile: chunks must be sizes of at least 1, got {tuple(chunks)}")
        fitting = {min(chunk, max_len * max_batch) for chunk in chunks}
        return Buckets(tuple(sorted({1, max_batch})), tuple(sorted(fitting)), unit, max_len)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One program to compile: a pure function and the avals of its arguments (the weights come first)."""

    name: str
    function: Callable[..., Any]
    avals: tuple[Any, ...]


def to_step(graph: Graph) -> Graph:
    """Returns the incremental step of a graph, derived with the default passes where it still is a forward."""
    for pass_ in () if graph.is_step else (Canonicalize(), FuseAttention(), KVCache()):
        graph = pass_(graph)
    return graph


def units(step: Graph, buckets: Buckets, target: str | None, *, kernels: bool = True) -> Iterator[Unit]:
    """Yields every program of a step graph: `decode_r<rows>` and `prefill_r<rows>_n<tokens>`.

    kernels: False keeps the reference bodies, for machines that lack the kernels.
    """
    weights = {name: _aval(step.aval(name)) for name in step.names("weight", "const")}
    for r in buckets.batches:
        state = tuple(state_avals(step, r, buckets.slots))
        logits = jax.ShapeDtypeStruct((r, step.vocab), jnp.float32)
        fixed = _lowered(step, target, kernels, tokens=r, selected=r, rows=r, slots=buckets.slots)
        yield Unit(f"decode_r{r}", decode_unit(fixed, buckets.unit), (weights, *_decode_avals(logits, r), state))
        for n in buckets.chunks:
            fixed = _lowered(step, target, kernels, tokens=n, selected=r, rows=r, slots=buckets.slots)
            chunk = [_ints(n), _ints(n), _ints(n), _ints(r), jax.ShapeDtypeStruct((r,), jnp.bool_)]
            yield Unit(f"prefill_r{r}_n{n}", prefill_unit(fixed), (weights, logits, *chunk, state))


def _lowered(step: Graph, target: str | None, kernels: bool, **sizes: int) -> Graph:
    fixed = Specialize(**sizes)(step)
    return LowerKernels(find_target(target).name)(fixed) if kernels else fixed


def _decode_avals(logits: Any, rows: int) -> tuple[Any, ...]:
    progress = Rows(logits, _ints(rows), jax.ShapeDtypeStruct((rows,), jnp.bool_), _ints(rows))
    sampling = jax.tree.map(_aval, Sampling.of(rows))
    return progress, sampling, _ints(STOP_TOKENS), jax.ShapeDtypeStruct((), jnp.int32)


def _ints(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _aval(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
