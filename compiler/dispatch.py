"""Tokens that are sorted by their experts, and put back: why this treats each token on its own.

A forward may sort all tokens by the expert that each chose, multiply the rows of an expert with its weight
(`jax.lax.ragged_dot`), and put them back (MegaBlocks, https://arxiv.org/abs/2211.15841). Sorted rows have an axis
`Sorted(order)`, which nothing but the order itself or its inverse turns into the axis that it was: what happens in
between is audited as on any other axis. Numbers that other tokens decide (the order, its inverse, how many tokens
chose each expert) are good for that, and for the group sizes of `ragged_dot`, and for nothing else.

Numbers go through `x[order // 2]`, `jnp.bincount` and the like in ways that depend on their authors. What such numbers
are is found by computing them for every place and every expert.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import grouped_sum
from xlathe.layout_rules import ELEMENTWISE, carry
from xlathe.layouts import Axes, Factors, Layout, Mixes, Root, Sorted, Spread, by_shape, moves, normal, same

_VIEWS = frozenset({"reshape", "broadcast_in_dim", "squeeze", "expand_dims"})
_SAMPLED: tuple[dict[str, ir.Dim], ...] = ({"b": 3, "t": 5}, {"b": 2, "t": 2048})
_MISUSED = {
    "order": "uses the order of sorted tokens, which other tokens decide, for more than to sort and put back",
    "inverse": "uses the places of sorted tokens, which other tokens decide, for more than to put them back",
    "counts": "uses how many tokens chose each expert, which other tokens decide, for more than ragged_dot's groups",
}
_CAPACITY = (
    "counts along the token axis which tokens chose an expert before this one: with a capacity it depends on other "
    "tokens whether an expert takes one"
)
_NOT_BACK = "puts sorted tokens back in another order than they came from"


class Dispatch:
    """Carries layouts through the routing of one graph; like `carry`, and raises Mixes as it does."""

    def __init__(self, jaxpr: ir.Jaxpr) -> None:
        self.producer = ir.producers(jaxpr.eqns)

    def __call__(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout]:
        rule = _RULES.get(eqn.primitive.name)
        found = rule(self, eqn, operands) if rule else None
        if found is not None:
            return found
        root = _passed_on(eqn, operands)
        misused = next((o.root.kind for o in operands if o.root and o.root.kind != "expert"), None)
        if misused and root is None:
            raise Mixes(_MISUSED[misused])
        return [Layout(axes, True, root) for axes in carry(eqn, operands)]

    def _largest(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout]:
        """top_k and argmax: the index is a choice of experts."""
        axis = eqn.params["axis"] if "axis" in eqn.params else eqn.params["axes"][0]
        count = eqn.invars[0].aval.shape[axis]
        results = [Layout(axes, True) for axes in carry(eqn, operands)]
        if not ir.is_symbolic(count):
            root = Root(eqn.outvars[-1], "expert", key=eqn.outvars[-1], experts=int(count))
            results[-1] = dataclasses.replace(results[-1], root=root)
        return results

    def _sort(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout] | None:
        key = operands[0]
        if len(key.axes) != 1 or not moves(key.axes[0]) or not key.of_tokens:
            return None
        listed = [i for i, a in enumerate(eqn.invars) if not operands[i].of_tokens and self._counts_up(a)]
        if key.root and key.root.kind == "order":
            return self._sort_back(eqn, key, listed)
        if any(isinstance(factor, Sorted) for factor in key.axes[0]):
            raise Mixes("sorts the token axis again")
        of_tokens = [o for i, o in enumerate(operands) if i not in listed]
        if any(o.axes != key.axes or not o.of_tokens or _decided_by_others(o) for o in of_tokens):
            raise Mixes("sorts positions, or tokens that are merged in another order, by the tokens' values")
        chosen = key.root if key.root and self._is_index(eqn.invars[0], key.root) else None
        order = eqn.outvars[listed[0] if listed else 0]
        place = Sorted(order, key.axes[0], chosen.key if chosen else None)
        roots = dict.fromkeys(listed, Root(order, "order", place.key, order=order, of=key.axes[0]))
        if chosen:
            roots[0] = dataclasses.replace(chosen, var=eqn.outvars[0])
        return [Layout(((place,),), True, roots.get(i)) for i in range(len(operands))]

    def _sort_back(self, eqn: ir.JaxprEqn, key: Layout, listed: Sequence[int]) -> list[Layout]:
        """`argsort` of an order is its inverse."""
        root = key.root
        assert root is not None and root.order is not None
        if listed != [1] or len(eqn.invars) != 2 or not _sorted_by(key.axes[0], root) or not self._is_index(
            eqn.invars[0], root
        ):  # fmt: skip
            raise Mixes(_MISUSED["order"])
        inverse = dataclasses.replace(root, var=eqn.outvars[1], kind="inverse")
        return [Layout((root.of,), True, root), Layout((root.of,), True, inverse)]

    def _gather(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout] | None:
        table, index = operands
        root, numbers = index.root, eqn.params["dimension_numbers"]
        if root is None or root.kind not in ("order", "inverse"):
            return self._part(eqn, operands)
        (axis,) = numbers.collapsed_slice_dims if len(numbers.collapsed_slice_dims) == 1 else (None,)
        sizes = [n for i, n in enumerate(eqn.params["slice_sizes"]) if i != axis]
        rest = [n for i, n in enumerate(eqn.invars[0].aval.shape) if i != axis]
        whole = all(map(ir.same_dim, sizes, rest))
        if axis is None or numbers.start_index_map != (axis,) or numbers.operand_batching_dims or not whole:
            raise Mixes(_MISUSED[root.kind])
        if not table.of_tokens:  # a number of the place alone, such as which token it is of
            if root.kind != "order" or rest:
                raise Mixes(_MISUSED[root.kind])
            return [Layout(index.axes[:-1], True, root)]
        offsets = iter(axes for i, axes in enumerate(table.axes) if i != axis)
        places = iter(self._moved(eqn.invars[1], index, root, table.axes[axis]))
        ndim = eqn.outvars[0].aval.ndim
        return [Layout(tuple(next(offsets if i in numbers.offset_dims else places) for i in range(ndim)), True)]

    def _moved(self, atom: ir.Atom, index: Layout, root: Root, table: Factors) -> Axes:
        """Returns the axes of what an index looks up along an axis of a table."""
        places = index.axes[:-1]
        if root.kind == "order":
            inner = _inner(table, root.of)
            fits = inner is not None and len(places) == 1 and _sorted_by(places[0], root)
        else:
            inner, fits = 1, _sorted_by(table, root) and _flat(places) == root.of
        if not fits or inner is None or not self._is_index(atom, root, inner):
            raise Mixes(_NOT_BACK)
        return places

    def _scatter(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout] | None:
        base, index, updates = operands
        root, numbers = index.root, eqn.params["dimension_numbers"]
        if root is None or root.kind == "counts":
            return None
        if root.kind == "expert":
            return self._count_by_scatter(eqn, operands, root)
        axes, places = numbers.scatter_dims_to_operand_dims, index.axes[:-1]
        if root.kind != "order" or len(axes) != 1 or numbers.inserted_window_dims != axes or len(places) != 1:
            raise Mixes(_MISUSED[root.kind])
        (axis,) = axes
        target = self._target(eqn, root)
        if target is None or not _sorted_by(places[0], root) or not (base.of_tokens or _is_spread(base.axes[axis])):
            raise Mixes(_NOT_BACK)
        if eqn.primitive.name == "scatter" and target != root.of:
            raise Mixes("puts several rows of a token into one place, of which one stays")
        if not updates.of_tokens:
            if eqn.primitive.name != "scatter" or base.of_tokens or not self._counts_up(eqn.invars[2]):
                raise Mixes(_MISUSED["order"])
            return [Layout((root.of,), True, dataclasses.replace(root, var=eqn.outvars[0], kind="inverse"))]
        windows = [updates.axes[i] for i in numbers.update_window_dims]
        (rows,) = [factors for i, factors in enumerate(updates.axes) if i not in numbers.update_window_dims]
        if rows != places[0] or _decided_by_others(updates) or (base.of_tokens and base.axes[axis] != target):
            raise Mixes(_NOT_BACK)
        kept = [factors for i, factors in enumerate(base.axes) if i != axis]
        stays = [Layout((k,), base.of_tokens) for k in kept]
        result = [same([k, Layout((w,), True)])[0] for k, w in zip(stays, windows, strict=True)]
        result.insert(axis, target)
        return [Layout(tuple(result), True)]

    def _target(self, eqn: ir.JaxprEqn, root: Root) -> Factors | None:
        """Returns what the axis holds that sorted rows are scattered along: places, or tokens with several of them."""
        (axis,) = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
        places, rows = eqn.invars[0].aval.shape[axis], eqn.invars[1].aval.shape[0]
        for target in (root.of, root.of[:-1]):
            inner = _inner(target, root.of)
            fits = inner is not None and ir.same_dim(places * inner, rows)
            if fits and self._is_index(eqn.invars[1], root, inner or 1):
                return target
        return None

    def _count_by_scatter(self, eqn: ir.JaxprEqn, operands: Sequence[Layout], root: Root) -> list[Layout] | None:
        """`jnp.bincount`: a one is added for each token at its expert."""
        if eqn.primitive.name != "scatter-add" or any(o.of_tokens for o in (operands[0], operands[2])):
            return None
        base, index, updates = eqn.invars
        if base.aval.ndim != 1 or not all(moves(factors) <= _is_spread(factors) for factors in operands[2].axes):
            return None
        plain = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims == (0,) and updates.aval.ndim >= 1
        if not plain or self._sample(base).any() or not (self._sample(updates) == 1).all():
            return None
        return self._counted(eqn, root) if self._is_index(index, root) else None

    def _count_by_sum(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout] | None:
        """`jax.nn.one_hot(experts, n).sum(0)`."""
        (before,), axes = operands, eqn.params["axes"]
        kept = [i for i in range(len(before.axes)) if i not in axes]
        if before.root is None or before.root.kind != "expert" or not any(moves(before.axes[i]) for i in axes):
            return None
        if len(kept) != 1 or moves(before.axes[kept[0]]):
            return None
        sizes: dict[str, ir.Dim] = {"b": 1, "t": before.root.experts}
        chosen = _numbers(before.root, sizes)
        found = np.moveaxis(self._sample(eqn.invars[0], {before.root.var: chosen}, sizes), kept[0], -1)
        count = found.shape[-1]
        right = np.array_equal(found.reshape(-1, count), chosen.reshape(-1, 1) == np.arange(count))
        return self._counted(eqn, before.root) if right else None

    def _counted(self, eqn: ir.JaxprEqn, root: Root) -> list[Layout]:
        out = eqn.outvars[0]
        if out.aval.shape != (root.experts,):
            raise Mixes(f"counts the tokens of {out.aval.shape[0]} experts, but one of {root.experts} is chosen")
        return [Layout(by_shape(out.aval.shape), True, Root(out, "counts", root.key, root.experts))]

    def _ragged_dot(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout]:
        rows, kernels = operands[:2]
        if grouped_sum(eqn) is None or kernels.of_tokens:
            raise Mixes("is no product of rows with one weight a group")
        return self._grouped(eqn, rows, operands[2], eqn.invars[2])

    def _quantized_ragged_dot(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout]:
        return self._grouped(eqn, operands[0], operands[1], eqn.invars[1])

    def _grouped(self, eqn: ir.JaxprEqn, rows: Layout, sizes: Layout, atom: ir.Atom) -> list[Layout]:
        root = sizes.root
        if root is None or root.kind != "counts" or not self._is_index(atom, root):
            raise Mixes("has group sizes that are not how many tokens chose each expert")
        place = rows.axes[0][0] if len(rows.axes[0]) == 1 else None
        if not isinstance(place, Sorted) or place.key is not root.key or moves(rows.axes[1]):
            raise Mixes("has rows that are not sorted by the experts whose counts its group sizes are")
        return [Layout((rows.axes[0], *by_shape(eqn.outvars[0].aval.shape[1:])), True)]

    def _part(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout] | None:
        """The first choice of each token, `experts[:, 0]`, is a choice of experts too."""
        root = operands[0].root
        if root is None or root.kind != "expert" or any(o.of_tokens for o in operands[1:]):
            return None
        (out,) = eqn.outvars
        found = self._sample(out, {root.var: _numbers(root, _SAMPLED[0])}, _SAMPLED[0])
        part = Root(out, "expert", out, root.experts) if ((found >= 0) & (found < root.experts)).all() else None
        return [Layout(axes, True, part) for axes in carry(eqn, operands)]

    def _accumulate(self, eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> list[Layout] | None:
        (before,) = operands
        if before.root and before.root.kind == "expert" and moves(before.axes[eqn.params["axis"]]):
            raise Mixes(_CAPACITY)
        return None

    def _counts_up(self, atom: ir.Atom) -> bool:
        """Says whether a value that depends on sizes alone is 0, 1, 2, ..."""
        if atom.aval.ndim != 1 or atom.aval.dtype.kind not in "iu" or not ir.is_symbolic(atom.aval.shape[0]):
            return False
        found = self._sample(atom)
        return np.array_equal(found, np.arange(found.size))

    def _is_index(self, atom: ir.Atom, root: Root, inner: int = 1) -> bool:
        """Says whether numbers that are made of a root alone are that root, divided by `inner` without a rest."""
        for sizes in _SAMPLED:
            numbers = _numbers(root, sizes)
            found = self._sample(atom, {root.var: numbers}, sizes)
            if not np.array_equal(found.reshape(-1), numbers.reshape(-1) // inner):
                return False
        return True

    def _sample(
        self,
        atom: ir.Atom,
        given: Mapping[ir.Var, np.ndarray] | None = None,
        sizes: Mapping[str, ir.Dim] = _SAMPLED[-1],
    ) -> np.ndarray:
        """Computes a value at some sizes, given values that it is made of. Raises Mixes where it takes a weight."""
        known: dict[ir.Var, Any] = dict(given or {})

        def value(atom: ir.Atom) -> Any:
            if isinstance(atom, ir.Literal):
                return atom.val
            if atom not in known:
                eqn = self.producer.get(atom)
                if eqn is None:
                    raise Mixes("has an index or a count that is made of weights")
                known.update(zip(eqn.outvars, ir.bind_at(eqn, [value(a) for a in eqn.invars], sizes), strict=True))
            return known[atom]

        with jax.ensure_compile_time_eval():
            return np.asarray(value(atom))


def _numbers(root: Root, sizes: Mapping[str, ir.Dim]) -> np.ndarray:
    """Returns whole numbers that a root may hold, each that it may hold at least once where it has room."""
    shape = ir.substitute(tuple(root.var.aval.shape), sizes)
    numbers = np.arange(np.prod(shape, dtype=int), dtype=root.var.aval.dtype).reshape(shape)
    return numbers % root.experts if root.kind == "expert" else numbers


def _passed_on(eqn: ir.JaxprEqn, operands: Sequence[Layout]) -> Root | None:
    """Returns what every number of the result is made of, where that is one number of a root."""
    if eqn.primitive.name not in ELEMENTWISE | _VIEWS:
        return None
    roots = {o.root for o in operands if o.of_tokens}
    same_everywhere = all(_is_spread(f) or not moves(f) for o in operands if not o.of_tokens for f in o.axes)
    return next(iter(roots)) if len(roots) == 1 and same_everywhere else None


def _decided_by_others(layout: Layout) -> bool:
    return layout.root is not None and layout.root.kind != "expert"


def _is_spread(factors: Factors) -> bool:
    return len(factors) == 1 and isinstance(factors[0], Spread)


def _sorted_by(factors: Factors, root: Root) -> bool:
    """Says whether an axis is sorted by the order that a root is about."""
    (place,) = factors if len(factors) == 1 else (None,)
    return isinstance(place, Sorted) and place.order is root.order


def _inner(table: Factors, of: Factors) -> int | None:
    """Returns how many places of `of` each place of a table stands for; None where it is another table."""
    rest = of[len(table) :]
    if of[: len(table)] != table or any(moves((factor,)) for factor in rest):
        return None
    return int(np.prod([int(factor) for factor in rest if isinstance(factor, int)], dtype=int))


def _flat(axes: Axes) -> Factors:
    return normal([tuple(factor for factors in axes for factor in factors)])[0]


_Rule = Callable[[Dispatch, ir.JaxprEqn, Sequence[Layout]], list[Layout] | None]
_RULES: Mapping[str, _Rule] = {
    "top_k": Dispatch._largest,
    "argmax": Dispatch._largest,
    "sort": Dispatch._sort,
    "gather": Dispatch._gather,
    "scatter": Dispatch._scatter,
    "scatter-add": Dispatch._scatter,
    "reduce_sum": Dispatch._count_by_sum,
    "ragged_dot_general": Dispatch._ragged_dot,
    ir.OP_PREFIX + "quantized_ragged_dot": Dispatch._quantized_ragged_dot,
    "slice": Dispatch._part,
    "cumsum": Dispatch._accumulate,
}
