"""Prove from a graph that everything outside attention treats each token on its own.

Every value that depends on the tokens gets labels: which of its axes hold the batch (`b`) and the tokens (`t`), also
inside merged axes. A rule for each primitive carries labels from operands to results; an operation that would mix
tokens, or for which no rule exists, is refused by name and source line.
"""

from collections.abc import Callable, Mapping, Sequence

from xlathe import jaxpr as ir
from xlathe.errors import DeriveError

Factor = str | int  # "b", "t", or the size of a static part of an axis
Label = tuple[Factor, ...]
Labels = tuple[Label, ...]

_ELEMENTWISE = """
abs acos acosh add and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp complex conj
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not optimization_barrier or
population_count pow real reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())


class Mixes(Exception):
    """Why an equation does not treat each token on its own."""


def token_labels(jaxpr: ir.Jaxpr, tokens: ir.Var, near_misses: Sequence[str] = ()) -> dict[ir.Var, Labels]:
    """Returns the labels of every live value that depends on the tokens [b, t].

    near_misses: why softmaxes of the graph were not recognized as attention, for the error.
    Raises DeriveError, naming operation and line, at the first one that mixes tokens or rows.
    """
    labels: dict[ir.Var, Labels] = {tokens: (("b",), ("t",))}
    for eqn in ir.live_equations(jaxpr):
        operands = [labels.get(a) if isinstance(a, ir.Var) else None for a in eqn.invars]
        if all(o is None for o in operands):
            continue
        try:
            results = _flow(eqn, operands)
        except Mixes as mixes:
            reasons = [f"not attention: {miss}" for miss in near_misses] if eqn.primitive.name == "dot_general" else []
            raise DeriveError(
                "; ".join([f"no incremental step: {_title(eqn)} {mixes} at {ir.source_line(eqn)}", *reasons])
            ) from None
        labels.update(zip(eqn.outvars, results, strict=True))
    return labels


def _title(eqn: ir.JaxprEqn) -> str:
    return eqn.primitive.name.removeprefix(ir.OP_PREFIX)


def _flow(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    name = eqn.primitive.name
    if name in ELEMENTWISE or (name in ir.CUSTOM_DERIVATIVE and len(eqn.outvars) == 1):
        labels = _same(operands)
        for label, size in zip(labels, eqn.outvars[0].aval.shape, strict=True):
            if not label and ir.is_symbolic(size):
                raise Mixes(
                    "combines every token with every position (a mask that depends on the tokens' values is not kept)"
                )
        return [labels] * len(eqn.outvars)
    rule = RULES.get(name.removeprefix(ir.OP_PREFIX))
    if rule is None and (name.startswith(("reduce_", "arg"))):
        rule = _reduce
    if rule is None:
        raise Mixes("has no rule for tokens")
    return [_normal(labels) for labels in rule(eqn, operands)]


def _mixed(label: Label) -> bool:
    return "b" in label or "t" in label


def _normal(labels: Labels) -> Labels:
    """Multiplies neighboring static factors and drops ones."""
    result = []
    for label in labels:
        merged: list[Factor] = []
        for factor in label:
            if isinstance(factor, int) and merged and isinstance(merged[-1], int):
                merged[-1] *= factor
            elif factor != 1:
                merged.append(factor)
        result.append(tuple(merged))
    return tuple(result)


def _static(shape: Sequence[ir.Dim]) -> Labels:
    return _normal(tuple(("?" if ir.is_symbolic(n) else int(n),) for n in shape))


def _same(operands: Sequence[Labels | None]) -> Labels:
    """Labels of an elementwise result; an operand's axis of size 1 fits any axis that holds no tokens."""
    known = [o for o in operands if o]
    result = []
    for labels in zip(*known, strict=True):
        distinct = {label for label in labels if label}
        if len(distinct) > 1 or (any(map(_mixed, distinct)) and () in labels):
            raise Mixes("combines tokens with other tokens")
        result.append(distinct.pop() if distinct else ())
    return tuple(result)


def _one(operands: Sequence[Labels | None]) -> Labels:
    if operands[0] is None or any(o is not None for o in operands[1:]):
        raise Mixes("takes an index or size that depends on the tokens")
    return operands[0]


def _axes_stay(labels: Labels, axes: Sequence[int], what: str) -> None:
    for axis in axes:
        if "t" in labels[axis]:
            raise Mixes(f"{what} the token axis")
        if "b" in labels[axis]:
            raise Mixes(f"{what} the batch axis")


def _transpose(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    return [tuple(_one(operands)[i] for i in eqn.params["permutation"])]


def _broadcast(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    source = dict(zip(eqn.params["broadcast_dimensions"], _one(operands[:1]), strict=True))
    shape = eqn.outvars[0].aval.shape
    result = []
    for i, size in enumerate(shape):
        label = source.get(i, ())
        if label == () and ir.is_symbolic(size):
            raise Mixes("repeats a token's value along the token axis")
        result.append(label or ((size,) if not ir.is_symbolic(size) else ()))
    return [tuple(result)]


def _squeeze(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    return [tuple(label for i, label in enumerate(_one(operands)) if i not in eqn.params["dimensions"])]


def _expand_dims(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    left = iter(_one(operands))
    return [tuple(() if i in eqn.params["dimensions"] else next(left) for i in range(eqn.outvars[0].aval.ndim))]


def _reshape(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    sizes = {"b": eqn_size(eqn, "b"), "t": eqn_size(eqn, "t")}
    factors = [f for label in _one(operands[:1]) for f in label]
    result = []
    for wanted in eqn.outvars[0].aval.shape:
        taken: list[Factor] = []
        size: ir.Dim = 1
        while not ir.same_dim(size, wanted):
            if not factors:
                raise Mixes("reshapes across the token axis")
            factor = factors.pop(0)
            rest = ir.divide_dim(wanted, size)
            if isinstance(factor, int) and isinstance(rest, int) and factor > rest:
                if factor % rest:
                    raise Mixes("reshapes across the token axis")
                factors.insert(0, factor // rest)
                factor = rest
            taken.append(factor)
            size = size * (sizes[factor] if isinstance(factor, str) else factor)
            if not isinstance(factor, int) and ir.divide_dim(wanted, size) is None:
                raise Mixes("reshapes across the token axis")
        result.append(tuple(taken))
    return [tuple(result)]


def eqn_size(eqn: ir.JaxprEqn, symbol: str) -> ir.Dim:
    """Returns the size variable of that name as an equation's shapes hold it."""
    for atom in (*eqn.invars, *eqn.outvars):
        for dim in atom.aval.shape:
            if (found := ir.dim_symbol(dim, symbol)) is not None:
                return found
    return 1


def _dot_general(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    sides = [o or _static(a.aval.shape) for o, a in zip(operands, eqn.invars, strict=True)]
    for labels, axes in zip(sides, (lhs_contract, rhs_contract), strict=True):
        _axes_stay(labels, axes, "sums over")
    free = [
        [i for i in range(len(labels)) if i not in (*contract, *batch)]
        for labels, contract, batch in zip(sides, (lhs_contract, rhs_contract), (lhs_batch, rhs_batch), strict=True)
    ]
    loose = [any(_mixed(labels[i]) or "?" in labels[i] for i in axes) for labels, axes in zip(sides, free, strict=True)]
    if all(loose):
        raise Mixes("multiplies every token with every other token")
    batch = []
    for left, right in zip(lhs_batch, rhs_batch, strict=True):
        pair = [s[i] for s, i, o in zip(sides, (left, right), operands, strict=True) if o is not None]
        if len(set(pair)) > 1:
            raise Mixes("pairs tokens with other tokens")
        batch.append(pair[0])
    if all(o is not None for o in operands) and any(loose):
        raise Mixes("multiplies every token with every other token")
    return [(*batch, *(sides[0][i] for i in free[0]), *(sides[1][i] for i in free[1]))]


def _reduce(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    labels, axes = _one(operands), eqn.params["axes"]
    _axes_stay(labels, axes, "reduces")
    return [tuple(label for i, label in enumerate(labels) if i not in axes)] * len(eqn.outvars)


def _along(key: str, what: str) -> Callable[[ir.JaxprEqn, Sequence[Labels | None]], list[Labels]]:
    """A rule for operations that run along one axis and keep the shape but for that axis."""

    def rule(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
        labels = _same(operands)
        axis = eqn.params.get(key, len(labels) - 1)
        axes = axis if isinstance(axis, tuple) else (axis % len(labels),)
        _axes_stay(labels, axes, what)
        return [_resized(labels, out.aval.shape, axes) for out in eqn.outvars]

    return rule


def _resized(labels: Labels, shape: Sequence[ir.Dim], axes: Sequence[int]) -> Labels:
    return tuple((shape[i],) if i in axes else label for i, label in enumerate(labels))  # type: ignore[misc]


def _concatenate(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    if ir.is_symbolic(shape[axis]):
        raise Mixes("concatenates along the token axis")
    known = [_resized(o, shape, (axis,)) for o in operands if o is not None]
    return [_same(known)]


def _stack(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    labels, axis = _same(operands), eqn.params["axis"]
    return [(*labels[:axis], (len(eqn.invars),), *labels[axis:])]


def _unstack(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    labels, axis = _one(operands), eqn.params["axis"]
    _axes_stay(labels, (axis,), "takes apart")
    return [(*labels[:axis], *labels[axis + 1 :])] * len(eqn.outvars)


def _tile(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    labels = _one(operands)
    repeated = [i for i, n in enumerate(eqn.params["reps"]) if not ir.same_dim(n, 1)]
    _axes_stay(labels, repeated, "repeats")
    return [_resized(labels, eqn.outvars[0].aval.shape, repeated)]


def _window(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    """slice, dynamic_slice, pad, split: the token axes must come through whole."""
    labels, before = _one(operands), eqn.invars[0].aval.shape
    results = []
    for out in eqn.outvars:
        changed = [i for i, (a, b) in enumerate(zip(before, out.aval.shape, strict=True)) if not ir.same_dim(a, b)]
        shifted = [i for i, (low, _, _) in enumerate(eqn.params.get("padding_config", ())) if low]
        _axes_stay(labels, sorted({*changed, *shifted}), "takes a part of, or shifts,")
        results.append(_resized(labels, out.aval.shape, changed))
    return results


def _gather(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, index = eqn.invars[0].aval, eqn.invars[1].aval
    table_labels = operands[0] or _static(table.shape)
    index_labels = operands[1] or _static(index.shape)
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for axis, label in enumerate(table_labels):
        if not (_mixed(label) or "?" in label) or axis in numbers.operand_batching_dims:
            continue
        if axis in dropped or axis in numbers.start_index_map or not ir.same_dim(sizes[axis], table.shape[axis]):
            raise Mixes("reads other tokens by an index into the token axis")
    for in_table, in_index in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        if operands[0] is not None and operands[1] is not None and table_labels[in_table] != index_labels[in_index]:
            raise Mixes("pairs tokens with the indices of other tokens")
    both = operands[0] is not None and operands[1] is not None
    loose = [i for i in range(index.ndim - 1) if i not in numbers.start_indices_batching_dims]
    if both and any(_mixed(index_labels[i]) for i in loose):
        raise Mixes("looks every token up in every other token")
    kept = iter(i for i in range(table.ndim) if i not in dropped)
    paired = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    batch = iter(range(index.ndim - 1))
    result: list[Label] = []
    for axis in range(eqn.outvars[0].aval.ndim):
        if axis in numbers.offset_dims:
            source = next(kept)
            whole = ir.same_dim(sizes[source], table.shape[source])
            result.append(table_labels[source] if whole else (sizes[source],))
        else:
            source = next(batch)
            label = index_labels[source]
            if operands[0] is not None and source in paired and not _mixed(label):
                label = table_labels[paired[source]]
            result.append(label)
    return [tuple(result)]


def _attention(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    for labels, what in zip(operands, ("queries", "keys", "values"), strict=False):
        if labels is None or labels[:2] != (("b",), ("t",)):
            raise Mixes(f"has {what} that do not follow the tokens")
    if any(o is not None for o in operands[3:]):
        raise Mixes("has a mask or bias that depends on the tokens' values, which the cache does not keep")
    queries = operands[0]
    assert queries is not None
    return [(*queries[:4], *_static(eqn.outvars[0].aval.shape[4:]))]


def _quantized_dot(eqn: ir.JaxprEqn, operands: Sequence[Labels | None]) -> list[Labels]:
    labels = _one(operands)
    _axes_stay(labels, (len(labels) - 1,), "sums over")
    return [(*labels[:-1], (eqn.outvars[0].aval.shape[-1],))]


Rule = Callable[[ir.JaxprEqn, Sequence[Labels | None]], list[Labels]]
RULES: Mapping[str, Rule] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "reshape": _reshape,
    "dot_general": _dot_general,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "slice": _window,
    "dynamic_slice": _window,
    "pad": _window,
    "split": _window,
    "gather": _gather,
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
