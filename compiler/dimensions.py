"""Dimensions that must shrink together: axes of values made of atoms, and atoms that are one and the same.

An axis carries a *label*, a tuple of atoms from outer to inner as in `axes`. Here atoms are also united: an
elementwise operation makes the axes of its operands one, a contraction those that it sums over. An atom may be a
concatenation of *parts* as well, so that `split` of a fused projection leads to the dimension of each piece.
What cannot shrink is blocked, with the reason.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xlathe import jaxpr as ir

Label = tuple[int, ...]
Labels = tuple[Label, ...]
Kept = Mapping[int, np.ndarray]
"""Indices that stay, in their new order, by atom; an atom that is not named stays whole."""


class Conflict(Exception):
    """Two readings of one axis that have no common refinement."""


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """All atoms of one analysis. Sizes are numbers or symbolic; only atoms of known size can shrink.

    parent: the union-find forest; factors: what an atom was split into; parts: what it is concatenated from;
    blocked: why a root may not shrink.
    """

    sizes: list[ir.Dim] = dataclasses.field(default_factory=list)
    parent: list[int] = dataclasses.field(default_factory=list)
    factors: dict[int, Label] = dataclasses.field(default_factory=dict)
    parts: dict[int, Labels] = dataclasses.field(default_factory=dict)
    blocked: dict[int, str] = dataclasses.field(default_factory=dict)

    def fresh(self, size: ir.Dim) -> Label:
        """Returns the label of a new axis; an axis of size 1 has no atoms."""
        if ir.same_dim(size, 1):
            return ()
        self.parent.append(len(self.sizes))
        self.sizes.append(size if ir.is_symbolic(size) else int(size))
        return (len(self.sizes) - 1,)

    def fresh_all(self, shape: Sequence[ir.Dim]) -> Labels:
        return tuple(self.fresh(size) for size in shape)

    def root(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = atom = self.parent[self.parent[atom]]
        return atom

    def resolve(self, label: Label) -> Label:
        """Returns the label in roots that have no factors."""
        leaves: list[int] = []
        for atom in map(self.root, label):
            leaves += self.resolve(self.factors[atom]) if atom in self.factors else (atom,)
        return tuple(leaves)

    def atoms(self, label: Label) -> set[int]:
        """Returns every atom that an axis is made of, inside parts as well."""
        roots = self.resolve(label)
        return {*roots, *(a for root in roots for part in self.parts.get(root, ()) for a in self.atoms(part))}

    def leaves(self) -> list[int]:
        """Returns the roots that consist of nothing finer, in order of appearance."""
        return [a for a in range(len(self.sizes)) if self.root(a) == a and a not in self.factors | self.parts]

    def size(self, label: Label) -> ir.Dim:
        size: ir.Dim = 1
        for atom in label:
            size = size * self.sizes[atom]
        return size

    def block(self, label: Label, reason: str) -> None:
        """Forbids that any atom of the label shrinks; the first reason stays."""
        for atom in self.resolve(label):
            self.blocked.setdefault(atom, reason)
            for part in self.parts.get(atom, ()):
                self.block(part, reason)

    def unify(self, left: Label, right: Label) -> None:
        """Makes two axes one. Raises Conflict where their factors do not line up."""
        a, b = list(self.resolve(left)), list(self.resolve(right))
        while a and b:
            if ir.same_dim(self.sizes[a[0]], self.sizes[b[0]]):
                self._merge(a.pop(0), b.pop(0))
            elif ir.divide_dim(self.sizes[a[0]], self.sizes[b[0]]) is not None:
                a[:1] = self._factor(a[0], self.sizes[b[0]])
            elif ir.divide_dim(self.sizes[b[0]], self.sizes[a[0]]) is not None:
                b[:1] = self._factor(b[0], self.sizes[a[0]])
            else:
                raise Conflict
        if a or b:
            raise Conflict

    def regroup(self, labels: Labels, shape: Sequence[ir.Dim]) -> Labels:
        """Labels the axes of a reshape's result, in row-major order. Raises Conflict where it cuts across axes."""
        atoms = [a for label in labels for a in self.resolve(label)]
        grouped = []
        for size in shape:
            taken: list[int] = []
            while not ir.same_dim(self.size(tuple(taken)), size):
                if not atoms:
                    raise Conflict
                rest = ir.divide_dim(size, self.size(tuple(taken)))
                if rest is None:
                    raise Conflict
                if ir.divide_dim(rest, self.sizes[atoms[0]]) is None:
                    atoms[:1] = self._factor(atoms[0], rest)
                taken.append(atoms.pop(0))
            grouped.append(tuple(taken))
        if atoms:
            raise Conflict
        return tuple(grouped)

    def cut(self, label: Label, start: int, limit: int) -> Label:
        """Returns the label of the indices `start` to `limit` of an axis. Raises Conflict where they cut a factor."""
        if start:
            label = self._divide(label, start)[1]
        return label if self.size(label) == limit - start else self._divide(label, limit - start)[0]

    def join(self, labels: Sequence[Label]) -> Label:
        """Returns the label of a concatenation."""
        if len(labels) == 1:
            return labels[0]
        (atom,) = self.fresh(sum(self.size(label) for label in labels))
        self.parts[atom] = tuple(labels)
        return (atom,)

    def kept(self, label: Label, kept: Kept) -> np.ndarray:
        """Returns which indices of an axis of known size stay."""
        indices = np.zeros(1, np.int64)
        for atom in self.resolve(label):
            own = self._kept_of(atom, kept)
            indices = (indices[:, None] * int(self.sizes[atom]) + own).reshape(-1)
        return indices

    def index(self, label: Label, atom: int) -> np.ndarray:
        """Returns which index of `atom` each index of an axis of known size belongs to; -1 where to none."""
        found = np.full(1, -1, np.int64)
        for root in self.resolve(label):
            own = self._index_in(root, atom)
            found = np.where(own >= 0, own, found[:, None]).reshape(-1)
        return found

    def _index_in(self, root: int, atom: int) -> np.ndarray:
        if root == atom:
            return np.arange(int(self.sizes[root]))
        if root in self.parts:
            return np.concatenate([self.index(part, atom) for part in self.parts[root]])
        return np.full(int(self.sizes[root]), -1)

    def size_of(self, label: Label, kept: Kept) -> ir.Dim:
        """Returns the size of an axis when only `kept` stays."""
        size: ir.Dim = 1
        for atom in self.resolve(label):
            size = size * (self.sizes[atom] if ir.is_symbolic(self.sizes[atom]) else len(self._kept_of(atom, kept)))
        return size

    def _kept_of(self, atom: int, kept: Kept) -> np.ndarray:
        if atom not in self.parts:
            return kept.get(atom, np.arange(int(self.sizes[atom])))
        offsets = np.cumsum([0, *(self.size(part) for part in self.parts[atom])])
        return np.concatenate([self.kept(p, kept) + start for p, start in zip(self.parts[atom], offsets, strict=False)])

    def _merge(self, left: int, right: int) -> None:
        left, right = self.root(left), self.root(right)
        if left == right:
            return
        if left in self.parts and right in self.parts:
            self._align(left, right)
        if left in self.parts:
            left, right = right, left
        self.parent[left] = right
        reason = self.blocked.get(right) or self.blocked.get(left)
        if reason is not None:
            self.block((right,), reason)

    def _align(self, left: int, right: int) -> None:
        """Cuts two concatenations at each other's seams and unites their parts."""
        for bound in self._seams(left):
            self._divide((right,), bound)
        for bound in self._seams(right):
            self._divide((left,), bound)
        for a, b in zip(self.parts[left], self.parts[right], strict=True):
            self.unify(a, b)

    def _seams(self, atom: int) -> list[int]:
        return [int(n) for n in np.cumsum([self.size(part) for part in self.parts[atom]])[:-1]]

    def _factor(self, atom: int, outer: ir.Dim) -> Label:
        inner = ir.divide_dim(self.sizes[atom], outer)
        if inner is None or atom in self.parts or ir.same_dim(outer, 1) or ir.same_dim(inner, 1):
            raise Conflict
        self.factors[atom] = (*self.fresh(outer), *self.fresh(inner))
        if atom in self.blocked:
            self.block(self.factors[atom], self.blocked[atom])
        return self.factors[atom]

    def _divide(self, label: Label, at: int) -> tuple[Label, Label]:
        """Cuts an axis in two."""
        first, *rest = self.resolve(label)
        inner = self.size(tuple(rest))
        if ir.is_symbolic(self.size(label)) or at % inner:
            raise Conflict
        left, right = self._divide_atom(first, at // inner)
        return (*left, *rest), (*right, *rest)

    def _divide_atom(self, atom: int, at: int) -> tuple[Label, Label]:
        if atom not in self.parts:
            self.parts[atom] = (self.fresh(at), self.fresh(self.sizes[atom] - at))
            if atom in self.blocked:
                self.block((atom,), self.blocked[atom])
        parts, start = self.parts[atom], 0
        for i, part in enumerate(parts):
            end = start + int(self.size(part))
            if start < at < end:
                parts = (*parts[:i], *self._divide(part, at - start), *parts[i + 1 :])
                self.parts[atom] = parts
            if at < end:
                break
            start = end
        count = next(n for n in range(len(parts) + 1) if sum(int(self.size(p)) for p in parts[:n]) == at)
        return self.join(parts[:count]), self.join(parts[count:])
