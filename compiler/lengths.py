"""Compare a traced model with its author's code at short lengths.

A trace sees one side of every branch on a size. With symbolic sizes `t == 1` is false, and lengths that were aligned
are long ones, so that `t > 9` is true: either would be followed for every row, without an error. So short lengths are
tried, and of each number that the model compares a size with, while symbols are traced, the first sizes that equal it.

What stays unseen: a branch on one length that is looked up by its hash (`table.get(t)`, `t in {16, 32}`), on two sizes
together (`shape == (4, 16)`), on `MOST_ROWS` rows or more, on some of the sizes at which an equality holds
(`b * t == 12 and t > 3`), and, where symbols cannot be traced at all, behind the line at which they failed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Any

import jax
import numpy as np
from jax import export

from xlathe import jaxpr as ir
from xlathe.align import Fit, flatten, same_program, trace_at
from xlathe.errors import TraceError

type Size = tuple[int, int]  # (rows, length)

SHORT = ((2, 2), (3, 5), (2, 8))
ONE = (1, 1)  # often another program, as JAX treats axes of size 1 as it likes
TOLERANCE = {8: 1e-6, 4: 1e-3}  # of the largest logit, by bytes of a number: the order of sums may differ
MOST_TOKENS = 4096  # of which a whole forward is run
MOST_ROWS = 64  # among which the number of rows is sought that a model asks for
COARSE = 5e-2  # the same where numbers are narrower


def check_lengths(
    at: Callable[[int, int], ir.Jaxpr],
    graph: ir.Jaxpr,
    arrays: Sequence[Any],
    constants: Sequence[Any],
    max_len: int,
) -> None:
    """Compares programs at short lengths with a long one; where they differ, runs model and graph on a few tokens.

    at: traces the model, a function of `arrays` and tokens, at sizes. graph: takes `arrays`, `constants` and tokens
        [b, t]. Raises TraceError, naming the length, where they do not compute the same or only one can run.
    """
    rows, length = graph.invars[-1].aval.shape
    long = (3, max(max_len - 1, 1))  # less than max_len: a slice of a whole table is no slice
    usual = [long, *(size for size in SHORT if size[1] <= max_len)]
    single = [ONE] if ONE not in usual else []
    for dim, number in _asked(at, length):
        single.extend(_sizes_that_equal(dim, number, max_len, (*usual[1:], *single)))
    traces = {size: trace_at(at, *size) for size in (*usual, *single)}
    flat = {size: flatten(trace) for size, trace in traces.items()}

    def agree(*sizes: Size) -> bool:
        return len(sizes) == 1 or same_program([flat[size] for size in sizes], Fit(sizes, rows, length))

    if agree(*usual, *single):
        return
    differing = [s for s in single if not agree(*usual, s)] if agree(*usual) else [*usual[1:], *single]
    for size in differing:
        if size[0] * size[1] > MOST_TOKENS:
            raise TraceError(f"the model runs another program on {_told(size)} alone, which are too many to compare it "
                             "by running: write it without a branch on the length")  # fmt: skip
        tokens = np.random.default_rng(0).integers(0, graph.outvars[0].aval.shape[-1], size, np.int32)
        found = ir.evaluate_at(graph, [*arrays, *constants, tokens], dict(zip("bt", size, strict=True)))[0]
        _compare(found, ir.evaluate(traces[size], [*arrays, tokens])[0], size)


def _asked(at: Callable[[Any, Any], ir.Jaxpr], length: ir.DimExpr) -> Iterable[tuple[ir.Dim, int]]:
    """Returns which sizes the model, and JAX for it, compare with which numbers in a trace with symbols."""
    asked: list[tuple[ir.DimExpr, int]] = []
    # In a scope of their own: JAX keeps one aval of those that are equal, which would be one that lists nothing.
    own = export.symbolic_shape("b, t", constraints=ir.dim_constraints(length))
    try:
        at(*(ir.AskedDim(dim, asked) for dim in own if isinstance(dim, ir.DimExpr)))
    except Exception:  # as in `trace`: the comparisons up to there count
        return dict.fromkeys(asked)
    return dict.fromkeys(asked)


def _sizes_that_equal(dim: ir.Dim, number: int, max_len: int, tried: Sequence[Size]) -> Iterator[Size]:
    """Yields the first sizes at which `dim` is `number`, if there are some and none of them are tried anyway."""

    def holds(size: Size) -> bool:
        return bool(ir.substitute(dim, dict(zip("bt", size, strict=True))) == number)

    if not ir.may_equal(dim, number) or any(map(holds, tried)):
        return
    names = ir.dim_vars(dim)
    rows = range(1, MOST_ROWS) if "b" in names else (2,)
    lengths = range(1, max_len + 1) if "t" in names else (min(5, max_len),)
    yield from islice(filter(holds, product(rows, lengths)), 1)


def _told(size: Size) -> str:
    return f"{size[0]} row(s) of {size[1]} token(s)"


def _compare(found: jax.Array, expected: jax.Array, size: Size) -> None:
    bound = TOLERANCE.get(found.dtype.itemsize, COARSE)
    a, b = (np.asarray(x, np.float64) for x in (found, expected))
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=bound * scale, equal_nan=True):
        raise TraceError(
            f"the model computes something else on {_told(size)} than its trace at other sizes: "
            "it branches on the length or the number of rows in Python (if t == 1, min(t, 12)). Write it with jnp "
            "operations on arange(t)"
        )
