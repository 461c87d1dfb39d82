"""Where a factor can move from activations into weights: the channels of a value that products with weights sum over.

The value may be what a norm makes, which is scaled by the norm's weight, or what other weights make (a feed-forward's
up-projection, before its down-projection; the value projection, before the output projection of attention, where heads
that share their values share the factors). Dividing the makers' weights and multiplying the readers' by one number a
channel leaves the function of the model as it is. The pairs are found by following equations that commute with such a
factor; models declare nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import Axes, Einsum, Label, Labels, NoLabels
from xlathe.graph import Graph, Recipe
from xlathe.passes.quantize.head_values import copies_of, find_values
from xlathe.passes.quantize.uses import Uses
from xlathe.values import uniform_value


@dataclasses.dataclass(frozen=True)
class Side:
    """An axis of a weight. offset: what the model adds to the weight before it uses it (a norm by 1 + w)."""

    name: str
    axis: int
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """Weights that make the channels of a value, and all weights that read them, by products that sum over them.

    copies: where channels are read several times (values, by the heads that share them), the channel that each number
    that is summed over is a copy of; None: each is one of its own.
    """

    makers: tuple[Side, ...]
    readers: tuple[Side, ...]
    channels: int
    by_norm: bool
    copies: tuple[int, ...] | None = None

    def recipes(self, factors: np.ndarray) -> list[Recipe]:
        """Returns how the weights change: the readers' are multiplied by factors [channels], the makers' divided."""
        return [Recipe(s.name, (s.name,), Rescale(s.axis, 1 / factors, s.offset)) for s in self.makers] + [
            Recipe(s.name, (s.name,), Rescale(s.axis, self.copied(factors), s.offset)) for s in self.readers
        ]

    def copied(self, of_channels: np.ndarray) -> np.ndarray:
        """Returns what belongs to each channel, [channels], for all that is summed over."""
        return of_channels if self.copies is None else of_channels[list(self.copies)]

    def by_channel(self, columns: np.ndarray) -> np.ndarray:
        """Returns what belongs to all that is summed over, [n, k], as rows of each channel: [n * copies, channels]."""
        if self.copies is None:
            return columns
        order = np.argsort(self.copies, kind="stable")  # each channel has as many copies
        return columns[:, order].reshape(len(columns), self.channels, -1).swapaxes(1, 2).reshape(-1, self.channels)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Rescale:
    """Recipe of (w + offset) * factors - offset along an axis, computed in float64. factors: float64 [size]."""

    axis: int
    factors: np.ndarray
    offset: float

    def __call__(self, weight: Any) -> tuple[np.ndarray]:
        array = np.asarray(weight)
        shape = [-1 if i == self.axis else 1 for i in range(array.ndim)]
        scaled = (array.astype(np.float64) + self.offset) * self.factors.reshape(shape) - self.offset
        return (scaled.astype(array.dtype),)


class _Blocked(Exception):
    """Why a factor cannot pass."""


def find_pairs(graph: Graph) -> tuple[list[Pair], tuple[str, ...]]:
    """Returns all pairs in the order of the program, and why other products with weights are in none."""
    finder = _Finder(graph)
    pairs, misses, seen = [], [], set()
    for eqn in ir.live_equations(graph.jaxpr):
        for product in finder.products.get(id(eqn), ()):
            try:
                root, axis = finder.root(product)
                if (root, axis) in seen:
                    continue
                seen.add((root, axis))
                pairs.append(finder.pair(root, axis))
            except (_Blocked, NoLabels) as reason:
                misses.append(f"{product.name}: {reason}")
    return pairs, tuple(misses)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of a weight, or a view of it, with activations. axes: of the weight's own, those of the operand's."""

    name: str
    eqn: ir.JaxprEqn
    side: int
    axes: tuple[int | None, ...]

    def own_axis(self, operand_axis: int) -> int:
        """Returns which axis of the weight an axis of the operand is."""
        found = self.axes[operand_axis]
        if found is None:
            raise _Blocked(f"{self.name} is reshaped at {ir.source_line(self.eqn)}")
        return found


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.live = ir.live_equations(graph.jaxpr)
        self.producer, self.consumer = ir.producers(self.live), ir.consumers(self.live)
        self.inputs = dict(zip(graph.jaxpr.invars, graph.inputs, strict=True))
        self.results = {v for v in graph.jaxpr.outvars if isinstance(v, ir.Var)}
        self.products: dict[int, list[_Product]] = {}
        self.uses_of: dict[str, int] = {}
        uses = Uses(graph)
        for name in graph.names("weight"):
            labels, found = self._uses(uses, name)
            self.uses_of[name] = len(found)
            for use in found:
                if use.is_product and use.eqn.invars[1 - use.side] in uses.activations:
                    axes = tuple(labels.index(label) if label in labels and label else None for label in use.labels)
                    self.products.setdefault(id(use.eqn), []).append(_Product(name, use.eqn, use.side, axes))

    def _uses(self, uses: Uses, name: str) -> tuple[Labels, list[Any]]:
        try:
            return uses.of(name)
        except ValueError:
            return (), []

    def root(self, product: _Product) -> tuple[ir.Var, int]:
        """Returns the value under views that a product reads, and its axis of channels."""
        contracted = Einsum.of(product.eqn).contracted
        if len(contracted) != 1 or product.eqn.params["dimension_numbers"][1][0]:
            raise _Blocked(f"it is summed over several axes at {ir.source_line(product.eqn)}")
        var, axis = product.eqn.invars[1 - product.side], contracted[0][1 - product.side]
        axes = Axes()
        labels = axes.fresh_all(var.aval.shape)
        channel = labels[axis]
        while isinstance(var, ir.Var) and (eqn := self.producer.get(var)) is not None:
            above = axes.above(eqn, labels)
            if above is None or eqn.primitive.name == "broadcast_in_dim":
                break
            if axes.resolve(channel) not in [axes.resolve(label) for label in above[1]]:
                break  # the view divides the channels, or joins them with others
            var, labels = above
        assert isinstance(var, ir.Var)
        return var, [axes.resolve(label) for label in labels].index(axes.resolve(channel))

    def pair(self, root: ir.Var, axis: int) -> Pair:
        axes = Axes()
        labels = axes.fresh_all(root.aval.shape)
        readers, whole = self._readers(axes, root, labels, labels[axis]), labels[axis]
        if (values := self._values(axes, root, labels, whole)) is None:
            makers, copies = self._makers(axes, root, labels, whole, shared=True), None
        else:
            makers, copies = self._makers(axes, *values), copies_of(axes, whole, values[-1])
        both = {side.name for side in makers} & {side.name for side in readers}
        if both:
            raise _Blocked(f"{min(both)} makes what it reads")
        plain = all(self._is_vector(side.name) for side in makers)
        channels = int(root.aval.shape[axis]) if copies is None else max(copies) + 1
        return Pair(tuple(makers), tuple(dict.fromkeys(readers)), channels, plain, copies)

    def _values(
        self, axes: Axes, root: ir.Var, labels: Labels, channel: Label
    ) -> tuple[ir.Atom, Labels, Label] | None:
        """Returns the values that attention makes another value of, their labels, and which channels they have."""
        found = find_values(self.producer, axes, root, labels, channel)
        if found is None:
            return None
        var, above, way = found
        shared = next((each for each in way if len(self.consumer[each]) > 1), None)
        if shared is not None:
            raise _Blocked(f"the result of {self.producer[shared].primitive.name} has other uses")
        kept = [atom for label in above for atom in axes.resolve(label)]
        return var, above, tuple(atom for atom in axes.resolve(channel) if atom in kept)

    def _is_vector(self, name: str) -> bool:
        return any(item.name == name and var.aval.ndim == 1 for var, item in self.inputs.items())

    def _readers(self, axes: Axes, var: ir.Var, labels: Labels, channel: Label) -> list[Side]:
        """Returns the weights that read a value; raises _Blocked where anything else does."""
        if var in self.results:
            raise _Blocked("its activations are a result of the model")
        found = []
        for eqn in self.consumer.get(var, []):
            own = [p for p in self.products.get(id(eqn), ()) if eqn.invars[1 - p.side] is var]
            below = self._below(axes, eqn, labels)
            if own:
                (product,) = own
                (pair, *more) = Einsum.of(eqn).contracted
                if more or axes.resolve(labels[pair[1 - product.side]]) != axes.resolve(channel):
                    raise _Blocked(f"its activations are summed over other axes at {ir.source_line(eqn)}")
                if self.uses_of[product.name] > 1:
                    raise _Blocked(f"{product.name} is used elsewhere too")
                found.append(Side(product.name, product.own_axis(pair[product.side])))
            elif below is not None:
                found += self._readers(axes, eqn.outvars[0], below, channel)
            else:
                raise _Blocked(f"{eqn.primitive.name} reads its activations too at {ir.source_line(eqn)}")
        return found

    def _below(self, axes: Axes, eqn: ir.JaxprEqn, labels: Labels) -> Labels | None:
        try:
            return axes.forward(eqn, labels)
        except NoLabels:
            return None

    def _makers(self, axes: Axes, atom: ir.Atom, labels: Labels, channel: Label, *, shared: bool = False) -> list[Side]:
        """Returns the weights that are to be divided for a value to be divided by a number a channel.

        shared: whether the value may have several readers, which the caller knows. Raises _Blocked where there is none.
        """
        if isinstance(atom, ir.Literal):
            raise _Blocked("a number is added to its activations")
        if atom in self.inputs:
            return [self._side(axes, atom, labels, channel)]
        eqn = self.producer[atom]
        name, line = eqn.primitive.name, ir.source_line(eqn)
        if not shared and len(self.consumer[atom]) > 1:
            raise _Blocked(f"the result of {name} at {line} has other uses")
        if id(eqn) in self.products:
            return [self._product_side(axes, eqn, labels, channel)]
        above = axes.backward(eqn, labels)
        if above is not None or name == "neg":
            return self._makers(axes, eqn.invars[0], labels if above is None else above, channel)
        if name in ("add", "sub", "add_any"):
            return self._of_sum(axes, eqn, labels, channel)
        if name in ("mul", "div"):
            return self._of_product(axes, eqn, labels, channel)
        raise _Blocked(f"a factor does not pass {name} at {line}")

    def _side(self, axes: Axes, var: ir.Var, labels: Labels, channel: Label) -> Side:
        item = self.inputs[var]
        if item.kind != "weight" or len(self.consumer[var]) > 1:
            raise _Blocked(f"{item.name} is no weight of its own")
        return Side(item.name, self._axis(axes, labels, channel, item.name))

    def _axis(self, axes: Axes, labels: Labels, channel: Label, name: str) -> int:
        found = [i for i, label in enumerate(labels) if axes.resolve(label) == axes.resolve(channel)]
        if not found:
            raise _Blocked(f"{name} has no axis that is the channels")
        return found[0]

    def _product_side(self, axes: Axes, eqn: ir.JaxprEqn, labels: Labels, channel: Label) -> Side:
        (product,) = self.products[id(eqn)]
        axis = self._axis(axes, labels, channel, product.name)
        einsum = Einsum.of(eqn)
        operand = (einsum.lhs, einsum.rhs)[product.side]
        if axis not in operand or self.uses_of[product.name] > 1:
            raise _Blocked(f"{product.name} is used elsewhere too, or does not make the channels")
        return Side(product.name, product.own_axis(operand.index(axis)))

    def _of_sum(self, axes: Axes, eqn: ir.JaxprEqn, labels: Labels, channel: Label) -> list[Side]:
        constants = [uniform_value(atom, self.producer) for atom in eqn.invars]
        known = [i for i, value in enumerate(constants) if value is not None]
        if len(known) != 1 or eqn.primitive.name == "sub":
            return [s for a in eqn.invars for s in self._makers(axes, a, _spread(axes, a, labels, channel), channel)]
        other = eqn.invars[1 - known[0]]
        side, *more = self._makers(axes, other, _spread(axes, other, labels, channel), channel)
        if more or not self._is_vector(side.name) or side.offset:
            raise _Blocked(f"a number is added to its activations at {ir.source_line(eqn)}")
        return [dataclasses.replace(side, offset=float(constants[known[0]]))]  # type: ignore[arg-type]

    def _of_product(self, axes: Axes, eqn: ir.JaxprEqn, labels: Labels, channel: Label) -> list[Side]:
        """One operand takes the factor: the first that can, weights before activations."""
        operands: Sequence[ir.Atom] = eqn.invars[:1] if eqn.primitive.name == "div" else eqn.invars
        reason: Exception = _Blocked(f"nothing takes a factor at {ir.source_line(eqn)}")
        for atom in sorted(operands, key=self._depends_on_tokens):
            try:
                return self._makers(axes, atom, _spread(axes, atom, labels, channel), channel)
            except (_Blocked, NoLabels) as error:
                reason = error
        raise reason

    def _depends_on_tokens(self, atom: ir.Atom) -> bool:
        while isinstance(atom, ir.Var) and (eqn := self.producer.get(atom)) is not None:
            if len(operands := [a for a in eqn.invars if isinstance(a, ir.Var)]) != 1:
                return True
            atom = operands[0]
        return False


def _spread(axes: Axes, atom: ir.Atom, labels: Labels, channel: Label) -> Labels:
    """Returns the labels of an operand that is spread over axes where it has size 1; the channels must not be one."""
    own = tuple(() if ir.same_dim(n, 1) else label for n, label in zip(atom.aval.shape, labels, strict=False))
    if len(own) != len(labels) or axes.resolve(channel) not in [axes.resolve(label) for label in own]:
        raise _Blocked("one number for all channels is a part of its activations")
    return own
