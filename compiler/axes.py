"""Axis labels: which axis of one value is which axis of another, through every view in between.

Each axis carries a *label*, a tuple of atoms from outer to inner; an axis of size 1 carries the empty tuple. A merge
of axes concatenates labels, a split breaks an atom into finer ones, so that `[b, t, heads * d]` and
`[b, heads, t, d]` can be compared whatever route led from one to the other.
"""

import dataclasses
from collections.abc import Sequence

from xlathe import jaxpr as ir

Label = tuple[int, ...]
Labels = tuple[Label, ...]

SAME_SHAPE = frozenset({"convert_element_type", "stop_gradient", "copy", "copy_p", "optimization_barrier", "name"})


class NoLabels(Exception):
    """A view that cannot be followed on labels."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """The atoms of one analysis: their sizes, and the finer atoms that some were split into."""

    sizes: dict[int, ir.Dim] = dataclasses.field(default_factory=dict)
    splits: dict[int, Label] = dataclasses.field(default_factory=dict)

    def fresh(self, size: ir.Dim) -> Label:
        """Returns the label of a new axis."""
        if _is_one(size):
            return ()
        self.sizes[len(self.sizes)] = size
        return (len(self.sizes) - 1,)

    def fresh_all(self, shape: Sequence[ir.Dim]) -> Labels:
        return tuple(self.fresh(size) for size in shape)

    def resolve(self, label: Label) -> Label:
        """Returns the label in the finest atoms known by now."""
        return tuple(leaf for a in label for leaf in (self.resolve(self.splits[a]) if a in self.splits else (a,)))

    def size(self, label: Label) -> ir.Dim:
        return _product([self.sizes[a] for a in label])

    def regroup(self, labels: Labels, shape: Sequence[ir.Dim]) -> Labels:
        """Labels the axes of a reshape's other side, splitting atoms where it splits axes (row-major order)."""
        atoms = [a for label in labels for a in self.resolve(label)]
        grouped = []
        for size in shape:
            taken: list[int] = []
            while not _equal(self.size(tuple(taken)), size):
                if not atoms:
                    raise NoLabels(f"a reshape to {tuple(shape)} that does not follow the axes")
                if not _divides(self.size((*taken, atoms[0])), size):
                    atoms[:1] = self._split(atoms[0], _quotient(size, self.size(tuple(taken))))
                taken.append(atoms.pop(0))
            grouped.append(tuple(taken))
        if atoms:
            raise NoLabels(f"a reshape to {tuple(shape)} that does not follow the axes")
        return tuple(grouped)

    def _split(self, atom: int, outer: ir.Dim) -> Label:
        inner = _quotient(self.sizes[atom], outer)
        if _is_one(outer) or _is_one(inner):
            raise NoLabels("a reshape that does not follow the axes")
        self.splits[atom] = (*self.fresh(outer), *self.fresh(inner))
        return self.splits[atom]

    def backward(self, eqn: ir.JaxprEqn, labels: Labels) -> Labels | None:
        """Given the labels of a view's result returns those of its operand; None if the equation is no view."""
        name, operand, params = eqn.primitive.name, eqn.invars[0].aval if eqn.invars else None, eqn.params
        if operand is None:
            return None
        if name in SAME_SHAPE:
            return labels
        if name == "transpose":
            return tuple(labels[params["permutation"].index(i)] for i in range(operand.ndim))
        if name == "broadcast_in_dim":
            return tuple(
                () if _is_one(operand.shape[i]) else labels[d] for i, d in enumerate(params["broadcast_dimensions"])
            )
        if name == "squeeze":
            kept = iter(labels)
            return tuple(() if i in params["dimensions"] else next(kept) for i in range(operand.ndim))
        if name == "expand_dims":
            return tuple(label for i, label in enumerate(labels) if i not in params["dimensions"])
        if name == "reshape" and params.get("dimensions") is None:
            return self.regroup(labels, operand.shape)
        return None

    def above(self, eqn: ir.JaxprEqn, labels: Labels) -> tuple[ir.Var, Labels] | None:
        """Returns what a view is of, and its labels; None where the equation is no view of a variable, or its axes
        cannot be told apart."""
        try:
            upper = self.backward(eqn, labels)
        except NoLabels:
            return None
        return (eqn.invars[0], upper) if upper is not None and isinstance(eqn.invars[0], ir.Var) else None

    def forward(self, eqn: ir.JaxprEqn, labels: Labels) -> Labels | None:
        """Given the labels of a view's operand returns those of its result; None if it is no view, or repeats."""
        name, result, params = eqn.primitive.name, eqn.outvars[0].aval, eqn.params
        if name in SAME_SHAPE:
            return labels
        if name == "transpose":
            return tuple(labels[i] for i in params["permutation"])
        if name == "broadcast_in_dim" and _equal(_product(result.shape), _product(eqn.invars[0].aval.shape)):
            placed = dict(zip(params["broadcast_dimensions"], labels, strict=True))
            return tuple(placed.get(i, ()) for i in range(result.ndim))
        if name == "squeeze":
            return tuple(label for i, label in enumerate(labels) if i not in params["dimensions"])
        if name == "expand_dims":
            kept = iter(labels)
            return tuple(() if i in params["dimensions"] else next(kept) for i in range(result.ndim))
        if name == "reshape" and params.get("dimensions") is None:
            return self.regroup(labels, result.shape)
        return None


@dataclasses.dataclass(frozen=True)
class Einsum:
    """A `dot_general` read as axes: operand axis -> result axis, None where it is contracted."""

    lhs: tuple[int | None, ...]
    rhs: tuple[int | None, ...]
    contracted: tuple[tuple[int, int], ...]

    @staticmethod
    def of(eqn: ir.JaxprEqn) -> "Einsum":
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
        lhs_free = [i for i in range(eqn.invars[0].aval.ndim) if i not in (*lhs_contract, *lhs_batch)]
        rhs_free = [i for i in range(eqn.invars[1].aval.ndim) if i not in (*rhs_contract, *rhs_batch)]
        lhs_order = {axis: out for out, axis in enumerate([*lhs_batch, *lhs_free])}
        rhs_order = {axis: out for out, axis in enumerate(rhs_batch)}
        rhs_order |= {axis: len(lhs_order) + i for i, axis in enumerate(rhs_free)}
        return Einsum(
            tuple(lhs_order.get(i) for i in range(eqn.invars[0].aval.ndim)),
            tuple(rhs_order.get(i) for i in range(eqn.invars[1].aval.ndim)),
            tuple(zip(lhs_contract, rhs_contract, strict=True)),
        )

    def operand_labels(self, axes: Axes, eqn: ir.JaxprEqn, result: Labels) -> tuple[Labels, Labels]:
        """Returns labels of both operands from those of the result; contracted axes get a new shared label."""
        summed = [axes.fresh(eqn.invars[0].aval.shape[left]) for left, _ in self.contracted]
        left = {axis: label for (axis, _), label in zip(self.contracted, summed, strict=True)}
        right = {axis: label for (_, axis), label in zip(self.contracted, summed, strict=True)}
        return (
            tuple(left[i] if out is None else result[out] for i, out in enumerate(self.lhs)),
            tuple(right[i] if out is None else result[out] for i, out in enumerate(self.rhs)),
        )


def _is_one(size: ir.Dim) -> bool:
    return not ir.is_symbolic(size) and size == 1


def _equal(a: ir.Dim, b: ir.Dim) -> bool:
    return bool(ir.same_dim(a, b))


def _product(sizes: Sequence[ir.Dim]) -> ir.Dim:
    result: ir.Dim = 1
    for size in sizes:
        result = result * size
    return result


def _quotient(a: ir.Dim, b: ir.Dim) -> ir.Dim:
    """Returns a / b; raises NoLabels where it is no whole number for every size."""
    quotient = ir.divide_dim(a, b)
    if quotient is None:
        raise NoLabels(f"a reshape that would split {a} by {b}")
    return quotient


def _divides(a: ir.Dim, b: ir.Dim) -> bool:
    return ir.divide_dim(b, a) is not None


def grouped_sum(eqn: ir.JaxprEqn) -> int | None:
    """Returns the axis of the weights, 1 or 2, that a product of rows [m, k] with one of [groups, ., .] sums over.

    None where an equation is no such product: `ragged_dot_general` can do more.
    """
    if eqn.primitive.name != "ragged_dot_general" or len(eqn.invars) != 3:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (rows, weights), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    plain = tuple(rows) == (1,) and tuple(weights) in ((1,), (2,)) and not any(batch) and groups == ((0,), (0,))
    return int(weights[0]) if plain else None
