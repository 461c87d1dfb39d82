"""Compare a traced model with its author's code at short lengths.

A trace sees one side of every branch on a size. With symbolic sizes `t == 1` is false, and lengths that were aligned
are long ones, so that `t > 9` is true: either would be followed for every row, without an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from xlathe import jaxpr as ir
from xlathe.align import Fit, same_program, trace_at
from xlathe.errors import TraceError

SHORT = ((2, 2), (3, 5), (2, 8))  # (rows, length)
ONE = (1, 1)  # often another program, as JAX treats axes of size 1 as it likes
TOLERANCE = {8: 1e-6, 4: 1e-3}  # of the largest logit, by bytes of a number: the order of sums may differ
COARSE = 5e-2  # the same where numbers are narrower


def check_lengths(
    at: Callable[[int, int], ir.Jaxpr], graph: ir.Jaxpr, arrays: Sequence[Any], constants: Sequence[Any], max_len: int
) -> None:
    """Compares programs at short lengths with a long one; where they differ, runs model and graph on a few tokens.

    at: traces the model, a function of `arrays` and tokens, at concrete sizes. graph: takes `arrays`, `constants` and
        tokens [b, t]. Raises TraceError, naming the length, where they do not compute the same or only one can run.
    """
    long = (3, max(max_len - 1, 1))  # less than max_len: a slice of a whole table is no slice
    sizes = [long, *(size for size in SHORT if size[1] <= max_len), ONE]
    traces = [trace_at(at, *size) for size in sizes]
    rows, length = graph.invars[-1].aval.shape
    differing = next(n for n in (0, 1, len(sizes) - 1) if _agree(traces, sizes, n, rows, length))
    for size, trace in list(zip(sizes, traces, strict=True))[len(sizes) - differing :]:
        tokens = np.random.default_rng(0).integers(0, graph.outvars[0].aval.shape[-1], size, np.int32)
        found = ir.evaluate_at(graph, [*arrays, *constants, tokens], dict(zip("bt", size, strict=True)))[0]
        _compare(found, ir.evaluate(trace, [*arrays, tokens])[0], *size)


def _agree(
    traces: Sequence[ir.Jaxpr], sizes: Sequence[tuple[int, int]], without: int, rows: ir.Dim, length: ir.Dim
) -> bool:
    """Says whether all programs but for the last few are the same."""
    kept = len(sizes) - without
    return kept == 1 or same_program(traces[:kept], Fit(tuple(sizes[:kept]), rows, length))


def _compare(found: jax.Array, expected: jax.Array, rows: int, length: int) -> None:
    bound = TOLERANCE.get(found.dtype.itemsize, COARSE)
    a, b = (np.asarray(x, np.float64) for x in (found, expected))
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=bound * scale, equal_nan=True):
        raise TraceError(
            f"the model computes something else on {rows} row(s) of {length} token(s) than its trace at other sizes: "
            "it branches on the length or the number of rows in Python (if t == 1, min(t, 12)). Write it with jnp "
            "operations on arange(t)"
        )
