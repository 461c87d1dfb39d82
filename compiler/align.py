"""Symbolic sizes where tracing with symbols fails: trace at concrete sizes and align the equations.

Python code such as `if t > 1`, `np.tril(np.ones((t, t)))` or `local_window_size=` has no symbolic trace. The same
code at three pairs of sizes gives three lists of equations that agree but for numbers; each number is then found
as an expression of b and t. Two of the lengths are `max_len` and `max_len - 1` (coprime), so that a branch on the
length, a window say, is seen as the longest rows see it; the third is short, and must run the same program.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlathe import jaxpr as ir
from xlathe.errors import TraceError


class _Unfit(Exception):
    """Values that follow no expression of the sizes."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Finds expressions of the symbols (rows, length) from values seen at concrete sizes."""

    sizes: tuple[tuple[int, int], ...]
    rows: ir.Dim
    length: ir.Dim

    def __call__(self, *seen: Any) -> Any:
        """Returns the value that is `seen[i]` at `sizes[i]`; raises `_Unfit` where there is none."""
        first = seen[0]
        if isinstance(first, int) and not isinstance(first, bool):
            return self._number(seen)
        if isinstance(first, tuple) and len({len(s) for s in seen}) == 1:
            items = [self(*column) for column in zip(*seen, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if all(type(s) is type(first) and str(s) == str(first) for s in seen):
            return first
        raise _Unfit(f"{first!r} became {seen[1]!r}")

    def _number(self, seen: tuple[int, ...]) -> ir.Dim:
        if len(set(seen)) == 1:
            return seen[0]
        rows, length = zip(*self.sizes, strict=True)
        for symbol, values in ((self.length, length), (self.rows, rows)):
            offsets = {s - v for s, v in zip(seen, values, strict=True)}
            if len(offsets) == 1:
                return symbol + offsets.pop()
        areas = tuple(b * t for b, t in self.sizes)
        for symbol, values in ((self.length, length), (self.rows, rows), (self.rows * self.length, areas)):
            factors = {divmod(s, v) for s, v in zip(seen, values, strict=True)}
            if len(factors) == 1 and next(iter(factors))[1] == 0:
                return next(iter(factors))[0] * symbol
        raise _Unfit(f"the numbers {seen} at sizes (b, t) = {self.sizes} follow no expression of b and t")


def trace_aligned(
    at: Callable[[int, int], ir.Jaxpr], rows: ir.Dim, length: ir.Dim, max_len: int, inconclusive: Exception
) -> tuple[ir.Jaxpr, list[np.ndarray]]:
    """Traces `at(b, t)` at three sizes; returns one jaxpr over the symbols, and its constants as inputs.

    The constants come before the last input (the tokens). Raises TraceError, naming the line, where the programs or
    their numbers do not follow from the sizes.
    """
    if max_len < 4:
        raise _error(f"max_len={max_len} is too short to align two lengths", inconclusive)
    sizes = ((3, max_len), (5, max_len - 1), (7, min(13, max_len - 2)))
    traces = [ir.inline_calls(trace_at(at, *size), _is_call) for size in sizes]
    fit = Fit(sizes, rows, length)
    patches = _align(traces, fit, inconclusive)
    try:
        shapes = [fit(*(np.shape(c) for c in group)) for group in zip(*(t.consts for t in traces), strict=True)]
        constants = [_longest(group) for group in zip(*(t.consts for t in traces), strict=True)]
    except (_Unfit, ValueError) as error:
        raise _error(f"a constant array of the model does not follow from the length: {error}", inconclusive) from None
    first = traces[0]
    leaves = [v.aval for v in first.invars[:-1]]
    tokens = jax.ShapeDtypeStruct((rows, length), first.invars[-1].aval.dtype)

    def symbolic(*operands: Any) -> list[Any]:
        held = operands[len(leaves) : -1]
        cut = [lax.slice(c, [0] * c.ndim, shape) for c, shape in zip(held, shapes, strict=True)]
        return ir.evaluate(first, [*operands[: len(leaves)], operands[-1]], _patched(patches), cut)

    try:
        return ir.trace(symbolic, *leaves, *(jax.typeof(c) for c in constants), tokens), constants
    except Exception as error:  # whatever JAX cannot decide for every size: a table of 16 rows cannot serve b of them
        raise _error(f"the programs at sizes {sizes} agree, but not for every size: {error}", inconclusive) from error


def flatten(trace: ir.Jaxpr) -> ir.Jaxpr:
    """Shows what calls and loops run, for `same_program`."""
    return ir.retrace(trace, _flattened)


def same_program(traces: Sequence[ir.Jaxpr], fit: Fit) -> bool:
    """Says whether flattened traces at `fit.sizes` run the same operations, on numbers that follow from the sizes."""
    try:
        _align(traces, fit, TraceError("no branch"))
        for group in zip(*(t.consts for t in traces), strict=True):
            _longest(group)
    except (TraceError, ValueError):
        return False
    return True


def _flattened(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Shows what calls and loops run: the body once stands for a scan of that length."""
    if (body := ir.call_body(eqn)) is None:
        return None
    if _is_call(eqn):
        return ir.evaluate(body, operands, _flattened)
    if eqn.primitive.name != "scan":
        return None
    constants, carried = ir.scan_parts(eqn)
    first = [xs[0] for xs in operands[constants + carried :]]
    results = ir.evaluate(body, [*operands[: constants + carried], *first], _flattened)
    rows = [jnp.broadcast_to(y, (eqn.params["length"], *y.shape)) for y in results[carried:]]
    return [*results[:carried], *rows]


def trace_at(at: Callable[[int, int], ir.Jaxpr], rows: int, length: int) -> ir.Jaxpr:
    """Traces at concrete sizes. Raises TraceError with whatever the model's author raises, or JAX for them."""
    try:
        return at(rows, length)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"the model must run on rows of every length up to max_len; it fails on {rows} row(s) of {length} "
            f"token(s): {type(error).__name__}: {_first_line(error)}"
        ) from error


def _error(reason: str, inconclusive: Exception) -> TraceError:
    return TraceError(f"{reason}. (Tracing with symbolic sizes failed first: {_first_line(inconclusive)})")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _is_call(eqn: ir.JaxprEqn) -> bool:
    return eqn.primitive.name in ir.CUSTOM_DERIVATIVE | ir.INLINED


Patch = tuple[dict[str, Any], dict[int, Any]]  # parameters and literal operands of an equation, as expressions


def _align(traces: Sequence[ir.Jaxpr], fit: Fit, inconclusive: Exception) -> dict[int, Patch]:
    """Returns for each equation of the first trace (by id) what changes with the sizes."""
    ordinals: list[dict[ir.Var, int]] = [_number_values(t) for t in traces]
    patches = {}
    counts = [len(t.eqns) for t in traces]
    for group in zip(*(t.eqns for t in traces), strict=False):
        names = {eqn.primitive.name for eqn in group}
        where = ir.source_line(group[0])
        if len(names) > 1:
            either = " or ".join(sorted(names))
            raise _error(f"the model runs {either} at {where}, depending on the length: it branches on the length or "
                         "loops over tokens in Python", inconclusive)  # fmt: skip
        wiring = {
            tuple(o.get(a) if isinstance(a, ir.Var) else None for a in eqn.invars)
            for eqn, o in zip(group, ordinals, strict=True)
        }
        if len(wiring) > 1:
            raise _error(f"the operands of {group[0].primitive.name} at {where} change with the length", inconclusive)
        try:
            patches[id(group[0])] = _patch(group, fit)
        except _Unfit as unfit:
            raise _error(f"{group[0].primitive.name} at {where} changes with the length: {unfit}. Write it with "
                         "jnp operations on arange(t)", inconclusive) from None  # fmt: skip
    if len(set(counts)) > 1:
        raise _error(f"the model runs {counts} operations at sizes (b, t) = {fit.sizes}: it branches on the length or "
                     f"loops over tokens in Python, after {where}", inconclusive)  # fmt: skip
    return patches


def _number_values(jaxpr: ir.Jaxpr) -> dict[ir.Var, int]:
    values = [*jaxpr.constvars, *jaxpr.invars, *(out for eqn in jaxpr.eqns for out in eqn.outvars)]
    return {value: i for i, value in enumerate(values)}


def _patch(group: tuple[ir.JaxprEqn, ...], fit: Fit) -> Patch:
    params = {key: fit(*(eqn.params[key] for eqn in group)) for key in group[0].params}
    literals = {}
    for i, atoms in enumerate(zip(*(eqn.invars for eqn in group), strict=True)):
        if not isinstance(atoms[0], ir.Literal) or len({str(a.val) for a in atoms}) == 1:
            continue
        if not jnp.issubdtype(atoms[0].aval.dtype, jnp.integer):
            raise _Unfit(f"the number {atoms[0].val} became {atoms[1].val}")
        literals[i] = fit(*(int(a.val) for a in atoms))
    return params, literals


def _patched(patches: dict[int, Patch]) -> ir.Rule:
    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any]:
        params, literals = patches[id(eqn)]
        for i, dim in literals.items():
            operands[i] = jnp.asarray(dim, eqn.invars[i].aval.dtype)
        return ir.bind(eqn, operands, **params)

    return rule


def _longest(group: tuple[Any, ...]) -> np.ndarray:
    """Returns the constant of the longest trace, the first, of which the others must be leading slices."""
    longest, *others = (np.asarray(c) for c in group)
    for other in others:
        if not np.array_equal(longest[tuple(slice(n) for n in other.shape)], other, equal_nan=other.dtype.kind == "f"):
            raise ValueError(f"the {list(other.shape)} array is no leading slice of the {list(longest.shape)} one")
    return longest
