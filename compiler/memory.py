"""What a program takes of a machine's memory, and what else would fit."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.aot import Buckets, Signature, served_avals, served_state
from xlathe.decode.drafters import DraftModel
from xlathe.decode.speculative import Speculation
from xlathe.graph import Graph
from xlathe.target import Target


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Bytes of what is remembered between calls: `rows * (row + token * slots)`, slots a multiple of `page`.

    row: of a row, whatever its length (rings, and what speculation counts); token: of each token that a row may hold.
    """

    row: int
    token: int
    page: int

    @staticmethod
    def of(step: Graph, buckets: Buckets, speculation: Speculation | None) -> "CacheSize":
        """Measures one row of two lengths."""
        drafter = speculation.drafter if speculation else None
        page = _page([step, drafter.step] if isinstance(drafter, DraftModel) else [step])
        short = page * math.ceil(buckets.slots / page)

        def size(slots: int) -> int:
            return total_bytes(
                served_state(step, dataclasses.replace(buckets, slots=slots), 1, speculation).values()
            )

        token = (size(short + page) - size(short)) // page
        return CacheSize(size(short) - token * short, token, page)

    def __call__(self, rows: int, slots: int) -> int:
        return rows * (self.row + self.token * slots)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that programs of up to `batch` rows of `context` tokens take on a target.

    weights: all arrays that programs are given, scales, tables and a draft's included; cache: what is remembered
    between calls; temporaries: the most that one program takes beside these (intermediate values, logits, padding of
    layouts) by the compiler's own account, None where it was not asked: `unknown` says why; memory: of the device, None
    where the target does not say.
    """

    target: str
    batch: int
    context: int
    weights: int
    cache: CacheSize
    temporaries: int | None = None
    unknown: str = ""
    memory: int | None = None

    @property
    def state(self) -> int:
        """Bytes remembered between calls by the compiled batch at the compiled context."""
        return self.cache(self.batch, self.context)

    @property
    def total(self) -> int:
        """Bytes in all; without the temporaries where they are not known."""
        return self.weights + self.state + (self.temporaries or 0)

    @property
    def free(self) -> int | None:
        """Bytes of the device that are left, negative where it does not fit."""
        return None if self.memory is None else self.memory - self.total

    @property
    def fits(self) -> bool:
        """Whether the device is large enough, as far as its memory and the temporaries are known."""
        return self.free is None or self.free >= 0

    @property
    def largest_batch(self) -> int | None:
        """The most rows of the compiled context, with temporaries as they are; None without a limit."""
        return self._most(lambda left: left // max(self.cache(1, self.context), 1))

    def largest_context(self, rows: int) -> int | None:
        """The most tokens that each of so many rows may hold, with temporaries as they are; None without a limit.

        The graph may have been traced for fewer.
        """
        token = self.cache.token
        if not token:
            return None
        return self._most(lambda left: (left // rows - self.cache.row) // token // self.cache.page * self.cache.page)

    def _most(self, fitting: Callable[[int], int]) -> int | None:
        if self.memory is None:
            return None
        return max(fitting(self.memory - self.weights - (self.temporaries or 0)), 0)

    @property
    def shortage(self) -> str:
        """What is needed and what would fit, in one line."""
        limits = [f"a batch of {self.largest_batch:,} at this context"]
        limits += [f"a context of {self.largest_context(rows):,} at batch {rows}" for rows in self._batches]
        return (
            f"does not fit {self.target}: needs {gigabytes(self.total)}, has {gigabytes(self.memory or 0)}; "
            f"largest that fit: {', '.join(limits)}"
        )

    @property
    def _batches(self) -> list[int]:
        return sorted({1, self.batch})

    def with_temporaries(self, programs: Iterable[tuple[Signature, jax.stages.Compiled]]) -> "MemoryPlan":
        """Returns the plan with what the compiler says of each program."""
        return dataclasses.replace(self, temporaries=max(itertools.starmap(_temporaries, programs)), unknown="")

    def to_text(self) -> str:
        """Returns a table of gigabytes (10^9 bytes) with what they are of."""
        return "\n".join(f"{name:<24}{value:>14}   {note}".rstrip() for name, value, note in self._lines())

    def _lines(self) -> Iterator[tuple[str, str, str]]:
        rows = f"{self.batch} row{'s' if self.batch > 1 else ''} of {self.context:,} tokens"
        each = f"{self.cache.token:,} bytes a token, {self.cache(1, self.context):,} a row"
        yield "target", self.target, rows
        yield "weights", gigabytes(self.weights), f"{self.weights:,} bytes"
        yield "cache", gigabytes(self.state), each
        if self.temporaries is None:
            yield "temporaries", "unknown", self.unknown
        else:
            yield "temporaries", gigabytes(self.temporaries), "the most that a program takes beside, by its compiler"
        yield "total", gigabytes(self.total), "" if self.temporaries is not None else "without temporaries"
        if self.memory is None:
            yield "memory", "unknown", f"{self.target} names many machines: say how much yours has"
            return
        yield "memory", gigabytes(self.memory), f"{gigabytes(self.memory - self.total)} free"
        yield "largest batch", f"{self.largest_batch:,}", f"of {self.context:,} tokens"
        for count in self._batches:
            context = self.largest_context(count)
            yield "largest context", "any" if context is None else f"{context:,}", f"at batch {count}"

    def to_json(self) -> str:
        """Returns all figures in bytes, rows and tokens; null is what is not known, or has no limit."""
        figures = {
            "target": self.target,
            "batch": self.batch,
            "context": self.context,
            "weights_bytes": self.weights,
            "cache_bytes_per_token": self.cache.token,
            "cache_bytes_per_row": self.cache(1, self.context),
            "cache_bytes": self.state,
            "temporary_bytes": self.temporaries,
            "temporaries_unknown_because": self.unknown or None,
            "total_bytes": self.total,
            "memory_bytes": self.memory,
            "free_bytes": self.free,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "largest_context_at_batch_1": self.largest_context(1),
            "largest_context_at_batch": self.largest_context(self.batch),
        }
        return json.dumps(figures, indent=1) + "\n"


def plan_from_graph(step: Graph, buckets: Buckets, target: Target, speculation: Speculation | None) -> MemoryPlan:
    """Plans what is known without a compiler: everything but temporaries. Weights may be shapes without values."""
    return MemoryPlan(
        target=target.name,
        batch=max(buckets.batches),
        context=buckets.slots,
        weights=total_bytes(served_avals(step, speculation).values()),
        cache=CacheSize.of(step, buckets, speculation),
        memory=target.chip.memory if target.chip else None,
    )


def _temporaries(signature: Signature, compiled: jax.stages.Compiled) -> int:
    """Returns what a program takes beside its weights, and its state, which it updates in place."""
    found = compiled.memory_analysis()
    assert found is not None  # of every back end that programs are compiled for
    taken = found.argument_size_in_bytes + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    taken += found.output_size_in_bytes - found.alias_size_in_bytes
    return max(taken - total_bytes(jax.tree.leaves((signature.avals[0], signature.avals[-1]))), 0)


def total_bytes(avals: Iterable[Any]) -> int:
    """Returns the bytes of arrays of these shapes and dtypes."""
    return sum(math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize for aval in avals)


def gigabytes(size: int) -> str:
    """Returns bytes as text in units of 10^9 bytes, or smaller ones for little."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} bytes"


def _page(steps: Iterable[Graph]) -> int:
    """Returns the number of tokens by which the caches of step graphs can grow."""
    states = [step.aval(name) for step in steps for name in step.names("state")]
    return math.lcm(*(a.shape[1] for a in states if "p" in ir.dim_vars(a.shape[0])))
