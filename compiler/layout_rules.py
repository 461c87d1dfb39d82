"""How operations carry the layouts of their operands to their results: one rule a primitive.

A rule raises `Mixes` where an operation does not treat each token, or each position, on its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from xlathe import jaxpr as ir
from xlathe.layouts import Axes, Factor, Factors, Layout, Mixes, Sorted, Spread, Unknown, by_shape, moves, normal, same

Rule = Callable[[ir.JaxprEqn, Sequence[Layout]], list[Axes]]


_ELEMENTWISE = """
abs acos acosh add and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp complex conj
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or
population_count pow real reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())


def _one(operands: Sequence[Layout]) -> Axes:
    if any(o.of_tokens for o in operands[1:]):
        raise Mixes("takes an index or size that depends on the tokens")
    return operands[0].axes


def _axes_stay(layout: Axes, axes: Sequence[int], what: str) -> None:
    for axis in axes:
        if "t" in layout[axis] or any(isinstance(factor, Sorted) for factor in layout[axis]):
            raise Mixes(f"{what} the token axis")
        if moves(layout[axis]):
            raise Mixes(f"{what} the batch axis")


def _transpose(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    return [tuple(_one(operands)[i] for i in eqn.params["permutation"])]


def _iota(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    shape = eqn.outvars[0].aval.shape
    return [tuple(by_shape([n])[0] if i == eqn.params["dimension"] else _repeated(n) for i, n in enumerate(shape))]


def _broadcast(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    source = dict(zip(eqn.params["broadcast_dimensions"], _one(operands[:1]), strict=True))
    result = []
    for i, size in enumerate(eqn.outvars[0].aval.shape):
        if not source.get(i) and ir.is_symbolic(size) and operands[0].of_tokens:
            raise Mixes("repeats a token's value along the token axis")
        result.append(source.get(i) or _repeated(size))
    return [tuple(result)]


def _repeated(size: ir.Dim) -> Factors:
    """What an axis holds along which a value is repeated."""
    return (Spread(size),) if ir.is_symbolic(size) else (int(size),)


def _empty(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    return [tuple(_repeated(size) for size in eqn.outvars[0].aval.shape)]


def _squeeze(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    return [tuple(factors for i, factors in enumerate(_one(operands)) if i not in eqn.params["dimensions"])]


def _expand_dims(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    left = iter(_one(operands))
    return [tuple(() if i in eqn.params["dimensions"] else next(left) for i in range(eqn.outvars[0].aval.ndim))]


def _reshape(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    symbols = {name: _symbol(eqn, name) for name in ("b", "t")}
    factors = [f for axis in _one(operands[:1]) for f in axis]
    result = []
    for left in eqn.outvars[0].aval.shape:
        taken: list[Factor] = []
        while not ir.same_dim(left, 1):
            if not factors:
                raise Mixes("reshapes across the token axis")
            taken.append(_take(factors, left, symbols))
            left = ir.divide_dim(left, _size(taken[-1], symbols))
        result.append(tuple(taken))
    return [tuple(result)]


def _take(factors: list[Factor], left: ir.Dim, symbols: Mapping[str, ir.Dim]) -> Factor:
    """Takes the next factor off the list, or as much of it as fits into what is left of an axis."""
    factor = factors.pop(0)
    size = _size(factor, symbols)
    if ir.divide_dim(left, size) is not None:
        return factor
    rest = ir.divide_dim(size, left)
    if rest is None or not isinstance(factor, int | Spread):
        raise Mixes("reshapes across the token axis")
    factors[:0] = _repeated(rest) if isinstance(factor, Spread) else (rest,)  # type: ignore[assignment]
    return _repeated(left)[0] if isinstance(factor, Spread) else left  # type: ignore[return-value]


def _size(factor: Factor, symbols: Mapping[str, ir.Dim]) -> ir.Dim:
    if isinstance(factor, Spread | Unknown):
        return factor.size
    if isinstance(factor, Sorted):
        return math.prod((_size(each, symbols) for each in factor.of), start=1)
    return symbols[factor] if isinstance(factor, str) else factor


def _symbol(eqn: ir.JaxprEqn, name: str) -> ir.Dim:
    """Returns the size variable of that name as an equation's shapes hold it."""
    for atom in (*eqn.invars, *eqn.outvars):
        for dim in atom.aval.shape:
            if (found := ir.dim_symbol(dim, name)) is not None:
                return found
    return 1


def _dot_general(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    contracted, batch = eqn.params["dimension_numbers"]
    for operand, axes in zip(operands, contracted, strict=True):
        _axes_stay(operand.axes, axes, "sums over")
    free = [
        [factors for i, factors in enumerate(operand.axes) if i not in (*summed, *paired)]
        for operand, summed, paired in zip(operands, contracted, batch, strict=True)
    ]
    moving = [any(map(moves, axes)) for axes in free]
    if all(moving) or (any(moving) and all(o.of_tokens for o in operands)):
        raise Mixes("multiplies every token with every other token")
    if any(m and not o.of_tokens for m, o in zip(moving, operands, strict=True)) and any(o.of_tokens for o in operands):
        raise Mixes("multiplies every token with every position")
    pairs = [[Layout((o.axes[i],), o.of_tokens) for o, i in zip(operands, pair, strict=True)]
             for pair in zip(*batch, strict=True)]  # fmt: skip
    return [(*(same(pair)[0] for pair in pairs), *free[0], *free[1])]


def _reduce(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    before, axes = _one(operands), eqn.params["axes"]
    _axes_stay(before, axes, "reduces")
    return [tuple(factors for i, factors in enumerate(before) if i not in axes)] * len(eqn.outvars)


def _along(key: str, what: str) -> Rule:
    """A rule for operations that run along one axis and keep the shape but for that axis."""

    def rule(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
        before = same(operands)
        axis = eqn.params.get(key, len(before) - 1)
        axes = axis if isinstance(axis, tuple) else (axis % len(before),)
        _axes_stay(before, axes, what)
        return [_resized(before, out.aval.shape, axes) for out in eqn.outvars]

    return rule


def _resized(before: Axes, shape: Sequence[ir.Dim], axes: Sequence[int]) -> Axes:
    """Puts new static sizes on some axes."""
    if any(ir.is_symbolic(shape[i]) for i in axes):
        raise Mixes("changes the number of tokens or positions")
    return tuple((int(shape[i]),) if i in axes else factors for i, factors in enumerate(before))


def _concatenate(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    if ir.is_symbolic(shape[axis]):
        raise Mixes("concatenates along the token axis")
    return [same([Layout(_resized(o.axes, shape, (axis,)), o.of_tokens) for o in operands])]


def _stack(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    before, axis = same(operands), eqn.params["axis"]
    return [(*before[:axis], (len(eqn.invars),), *before[axis:])]


def _unstack(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    before, axis = _one(operands), eqn.params["axis"]
    _axes_stay(before, (axis,), "takes apart")
    return [(*before[:axis], *before[axis + 1 :])] * len(eqn.outvars)


def _tile(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    before = _one(operands)
    repeated = [i for i, n in enumerate(eqn.params["reps"]) if not ir.same_dim(n, 1)]
    _axes_stay(before, repeated, "repeats")
    return [_resized(before, eqn.outvars[0].aval.shape, repeated)]


def _window(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    """slice, dynamic_slice, pad, split: the token axes must come through whole."""
    before, shape = _one(operands), eqn.invars[0].aval.shape
    padded = [i for i, n in enumerate(eqn.params.get("padding_config", ())) if not all(ir.same_dim(k, 0) for k in n)]
    results = []
    for out in eqn.outvars:
        changed = [i for i, (a, b) in enumerate(zip(shape, out.aval.shape, strict=True)) if not ir.same_dim(a, b)]
        _axes_stay(before, sorted({*changed, *padded}), "takes a part of, or shifts,")
        results.append(_resized(before, out.aval.shape, changed))
    return results


def _gather(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    table, index = operands
    whole = [ir.same_dim(size, n) for size, n in zip(sizes, shape, strict=True)]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for axis, factors in enumerate(table.axes):
        indexed = axis in dropped or axis in numbers.start_index_map or not whole[axis]
        if moves(factors) and indexed and axis not in numbers.operand_batching_dims:
            raise Mixes("reads other tokens by an index into the token axis")
    paired = {
        i: same([Layout((table.axes[a],), table.of_tokens), Layout((index.axes[i],), index.of_tokens)])[0]
        for a, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    }
    kept = [table.axes[i] if whole[i] else by_shape([sizes[i]])[0] for i in range(len(shape)) if i not in dropped]
    loose = [factors for i, factors in enumerate(index.axes[:-1]) if i not in paired]
    if any(map(moves, loose)) and (any(map(moves, kept)) or (table.of_tokens and any(map(moves, paired.values())))):
        raise Mixes("looks every token up at every other token or position")
    looked_up = iter(paired.get(i, index.axes[i]) for i in range(len(index.axes) - 1))
    offsets = iter(kept)
    ndim = eqn.outvars[0].aval.ndim
    return [tuple(next(offsets if axis in numbers.offset_dims else looked_up) for axis in range(ndim))]


def _scatter(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    """Writes to known places of axes that hold no tokens, as in `x.at[..., ::2].set(y)`."""
    numbers, (array, places, updates) = eqn.params["dimension_numbers"], operands
    if places.of_tokens or any(map(moves, places.axes)) or numbers.operand_batching_dims:
        raise Mixes("writes to places that depend on the tokens or positions")
    written = {*numbers.inserted_window_dims, *numbers.scatter_dims_to_operand_dims}
    _axes_stay(array.axes, sorted(written), "writes to some places of")
    windows = (axis for axis in range(len(array.axes)) if axis not in numbers.inserted_window_dims)
    window = dict(zip(windows, numbers.update_window_dims, strict=True))
    kept = [axis for axis in range(len(array.axes)) if axis not in written]
    fitted = same([
        Layout(tuple(array.axes[axis] for axis in kept), array.of_tokens),
        Layout(tuple(updates.axes[window[axis]] for axis in kept), updates.of_tokens),
    ])  # fmt: skip
    left = iter(fitted)
    loose = [updates.axes[i] for i in range(len(updates.axes)) if i not in {window[axis] for axis in kept}]
    if any(map(moves, loose)):
        raise Mixes("writes every token to the same places")
    return [tuple(factors if axis in written else next(left) for axis, factors in enumerate(array.axes))]


def _attention(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    for operand, what in zip(operands, ("queries", "keys", "values"), strict=False):
        if not operand.of_tokens or operand.axes[:2] != (("b",), ("t",)):
            raise Mixes(f"has {what} that do not follow the tokens")
    if any(o.of_tokens for o in operands[3:]):
        raise Mixes("has a mask or bias that depends on the tokens' values, which the cache does not keep")
    return [(*operands[0].axes[:4], *by_shape(eqn.outvars[0].aval.shape[4:]))]


def _quantized_dot(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    before = _one(operands)
    _axes_stay(before, (len(before) - 1,), "sums over")
    return [(*before[:-1], (eqn.outvars[0].aval.shape[-1],))]


def _each(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    return [operand.axes for operand in operands]


RULES: Mapping[str, Rule] = {
    "iota": _iota,
    "optimization_barrier": _each,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "empty": _empty,
    "expand_dims": _expand_dims,
    "reshape": _reshape,
    "dot_general": _dot_general,
    "reduce": _reduce,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "slice": _window,
    "dynamic_slice": _window,
    "pad": _window,
    "split": _window,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter,
    "sort": _along("dimension", "sorts along"),
    "top_k": _along("axis", "takes the largest along"),
    "rev": _along("dimensions", "reverses"),
    "cumsum": _along("axis", "accumulates along"),
    "cumprod": _along("axis", "accumulates along"),
    "cummax": _along("axis", "accumulates along"),
    "cummin": _along("axis", "accumulates along"),
    "cumlogsumexp": _along("axis", "accumulates along"),
    "attention": _attention,
    "quantized_dot": _quantized_dot,
}


def carry(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    """Returns the axes of an equation's results. Raises Mixes, also where no rule is known."""
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return _elementwise(eqn, operands)
    rule = RULES.get("reduce" if name.startswith(("reduce_", "arg")) else name.removeprefix(ir.OP_PREFIX))
    if rule is None:
        raise Mixes("has no rule for tokens")
    return [normal(axes) for axes in rule(eqn, operands)]


def _elementwise(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Axes]:
    if any(a.aval.ndim not in (0, eqn.outvars[0].aval.ndim) for a in eqn.invars):
        raise Mixes("takes numbers apart")  # bitcast_convert_type to narrower ones
    return [same(operands)]
