"""Parts of an axis that are looked up at fixed places, written as slices of it.

`x[..., :n]` and `x[..., ::2]` of a value with symbolic sizes are traced as gathers with indices that are numbers in the
program. A window is a slice; every s-th element is an index of the inner axis where the axis is split into [n, s].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from xlathe import jaxpr as ir
from xlathe.values import constant


@dataclasses.dataclass(frozen=True)
class Window:
    """`size` elements of one axis, `step` apart, from `start` on: value -> smaller value.

    With a step, all indices that leave the same rest by it. place: where the axis is in the result; None where it is
    gone.
    """

    axis: int
    start: int
    size: int
    step: int
    place: int | None

    def __call__(self, x: Any) -> Any:
        axis, shape = self.axis, x.shape
        if self.step > 1:
            x = lax.reshape(x, (*shape[:axis], self.size, self.step, *shape[axis + 1 :]))
            x = lax.squeeze(lax.slice_in_dim(x, self.start, self.start + 1, axis=axis + 1), (axis + 1,))
        else:
            x = lax.slice_in_dim(x, self.start, self.start + self.size, axis=axis)
        if self.place is None:
            return lax.squeeze(x, (axis,))
        order = [i for i in range(len(shape)) if i != axis]
        order.insert(self.place, axis)
        return x if order == sorted(order) else lax.transpose(x, order)


def find_windows(jaxpr: ir.Jaxpr) -> dict[ir.Var, Window]:
    """Returns the results that are windows, of gathers and of slices with a step."""
    producer = ir.producers(jaxpr.eqns)
    with jax.ensure_compile_time_eval():
        found = {eqn.outvars[0]: _gathered(eqn, producer) or _strided(eqn) for eqn in jaxpr.eqns}
    return {var: window for var, window in found.items() if window is not None}


def _strided(eqn: ir.JaxprEqn) -> Window | None:
    if eqn.primitive.name != "slice" or eqn.params["strides"] is None:
        return None
    shape, steps = eqn.invars[0].aval.shape, eqn.params["strides"]
    ranges = zip(shape, eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
    cut = [i for i, (n, *part) in enumerate(ranges) if (part[0], part[2]) != (0, 1) or not ir.same_dim(part[1], n)]
    if len(cut) != 1 or ir.is_symbolic(shape[cut[0]]):
        return None
    (axis,) = cut
    start, size = eqn.params["start_indices"][axis], eqn.outvars[0].aval.shape[axis]
    return _window(axis, [start + steps[axis] * i for i in range(size)], shape[axis], axis)


def _gathered(eqn: ir.JaxprEqn, producer: Mapping[ir.Var, ir.JaxprEqn]) -> Window | None:
    if eqn.primitive.name != "gather" or len(eqn.params["dimension_numbers"].start_index_map) != 1:
        return None
    numbers, shape, sizes = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    (axis,) = numbers.start_index_map
    whole = all(ir.same_dim(n, m) for i, (n, m) in enumerate(zip(sizes, shape, strict=True)) if i != axis)
    if not whole or numbers.operand_batching_dims or ir.is_symbolic(shape[axis]) or ir.is_symbolic(sizes[axis]):
        return None
    index = constant(eqn.invars[1], producer)
    if index is None:
        return None
    index, gone = np.asarray(index), axis in numbers.collapsed_slice_dims
    if index.ndim == 1 and set(numbers.collapsed_slice_dims) <= {axis}:
        places = index[0] + np.arange(sizes[axis])
        return _window(axis, places.tolist(), shape[axis], None if gone else axis)
    if index.ndim == 2 and numbers.collapsed_slice_dims == (axis,):
        (place,) = set(range(len(shape))) - set(numbers.offset_dims)
        return _window(axis, index[:, 0].tolist(), shape[axis], place)
    return None


def _window(axis: int, places: list[int], size: int, place: int | None) -> Window | None:
    """Returns the window that has these places of an axis; None where no slice or inner index has them."""
    step = places[1] - places[0] if len(places) > 1 else 1
    if places != list(range(places[0], places[0] + step * len(places), step or 1)):
        return None
    if step == 1 and places[0] >= 0 and places[-1] < size:
        return Window(axis, places[0], len(places), 1, place)
    exact = step > 1 and step * len(places) == size and 0 <= places[0] < step
    return Window(axis, places[0], len(places), step, place) if exact else None
