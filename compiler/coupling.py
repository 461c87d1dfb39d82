"""Find in a graph which axes must shrink together, and which cannot shrink.

The meaning of shrinking an atom: the weights are zero wherever an index of it that goes is concerned, so that the
smaller graph equals the whole graph with those weights set to zero, where means count what is left. A sum over an atom
is therefore allowed where its terms are zero at such indices, which is followed through the graph beside the labels.
What has no rule, or would count the zeros, blocks the atoms that it touches and is named.
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from xlathe import jaxpr as ir
from xlathe.axes import Einsum, grouped_sum
from xlathe.dimensions import Conflict, Dimensions, Label, Labels
from xlathe.experts import Routing, find_routings, is_of_softmax
from xlathe.graph import Graph
from xlathe.layout_rules import ELEMENTWISE
from xlathe.values import is_zero, uniform_value
from xlathe.windows import find_windows

_ZERO_IF_ANY = frozenset({"mul", "and"})
_ZERO_IF_ALL = frozenset({"add", "sub", "max", "min", "or", "add_any", "select_n"})
_ZERO_IF_FIRST = frozenset({"div", "rem", "integer_pow"})
_ZERO_AT_ZERO = frozenset({"neg", "abs", "sign", "tanh", "sin", "sinh", "asin", "asinh", "atan", "atanh", "erf", "sqrt",
                           "cbrt", "floor", "ceil", "round", "expm1", "log1p", "square", "convert_element_type", "copy",
                           "copy_p", "stop_gradient", "name", "reduce_precision"})  # fmt: skip
_SPREADS = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type"})
_OF_SOFTMAX = frozenset({"reduce_sum", "reduce_max"})
_SAME_COUNT = 2**-8  # the last place of a bfloat16, in which one over a number of terms may be written
_ALONG_AN_AXIS = {"cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis",
                  "sort": "dimension", "unstack": "axis"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A value's axes, and the atoms at whose removed indices it is zero."""

    labels: Labels
    zero: Label = ()


@dataclasses.dataclass(frozen=True)
class Coupling:
    """What `couple` found: labels of every value.

    heads: the key-value heads of each attention, in order; features: the channels of a head's values; depths: those of
    its queries and keys.
    means: values that are a sum divided by a number of terms, and the axes that were summed over, in one label. A mean
    over fewer terms is divided by fewer. sums: the axes of sums that are no such means and not with weights, and where:
    whether they count their terms is not known.
    routings: of the atoms that are experts; members: weights of one expert alone, the atom and its number.
    """

    dimensions: Dimensions
    values: dict[ir.Var, Coupled]
    heads: tuple[Label, ...]
    features: tuple[Label, ...]
    depths: tuple[Label, ...]
    means: dict[ir.Var, Label]
    sums: tuple[tuple[Label, str], ...]
    routings: dict[int, Routing]
    members: dict[ir.Var, tuple[int, int]]


def couple(graph: Graph) -> Coupling:
    """Labels every value of a graph that `separate` has prepared."""
    flow = _Flow(graph)
    flow.run()
    routings = flow.routings()
    return Coupling(
        flow.dims,
        flow.values,
        tuple(flow.heads),
        tuple(flow.features),
        tuple(flow.depths),
        flow.means,
        flow.uncounted(),
        routings,
        flow.members(routings),
    )


def separate(graph: Graph) -> Graph:
    """Inlines all calls, and spreads a value anew for every use, so that sharing it does not couple the users.

    A table of rotations, say, is spread over the heads of every layer alike, and each layer may get its own number.
    What is looked up at fixed places is sliced, where it can be (`windows.py`).
    """
    called = ir.INLINED | ir.CUSTOM_DERIVATIVE
    inlined = ir.inline_calls(graph.jaxpr, lambda eqn: eqn.primitive.name in called)
    producer = ir.producers(inlined.eqns)
    windows = find_windows(inlined)

    def run(*operands: Any) -> list[Any]:
        seen: dict[ir.Atom, Any] = dict(zip(inlined.invars, operands, strict=True))

        def anew(atom: ir.Atom, value: Any) -> Any:
            eqn = producer.get(atom) if isinstance(atom, ir.Var) else None
            if eqn is None or eqn.primitive.name != "broadcast_in_dim":
                return value
            source = eqn.invars[0]
            with ir.at_source_of(eqn):
                return ir.bind(eqn, [anew(source, source.val if isinstance(source, ir.Literal) else seen[source])])[0]

        def rule(eqn: ir.JaxprEqn, values: list[Any]) -> list[Any]:
            fresh = [anew(a, value) for a, value in zip(eqn.invars, values, strict=True)]
            window = windows.get(eqn.outvars[0])
            outputs = [window(fresh[0])] if window else ir.bind(eqn, fresh)
            seen.update(zip(eqn.outvars, outputs, strict=True))
            return outputs

        return ir.evaluate(inlined, operands, rule)

    jaxpr, kept = ir.drop_dead(ir.trace(run, *(v.aval for v in inlined.invars)), keep=lambda i: True)
    assert len(kept) == len(graph.inputs)
    return graph.replace(jaxpr=jaxpr)


class _Flow:
    """One walk over the equations, from inputs to results."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.jaxpr = graph.jaxpr
        self.producer = ir.producers(self.jaxpr.eqns)
        self.dims = Dimensions()
        self.values: dict[ir.Var, Coupled] = {}
        self.heads: list[Label] = []
        self.features: list[Label] = []
        self.depths: list[Label] = []
        self.means: dict[ir.Var, Label] = {}
        self.summed: dict[ir.Var, tuple[Label, str]] = {}
        self.trained: set[ir.Atom] = set()  # values that are made of weights
        self.blocked: list[tuple[Label, str]] = []  # but for experts
        self.contracted: list[tuple[Label, str]] = []
        self.numbered: list[tuple[Label, str]] = []
        self.joined: list[tuple[set[int], set[int], str]] = []  # atoms where one side is zero, and where one is not
        self.all_zero: list[tuple[Coupled, str]] = []  # results that are zero where all operands are

    def run(self) -> None:
        for item, var in zip(self.graph.inputs, self.jaxpr.invars, strict=True):
            labels = self.dims.fresh_all(var.aval.shape)
            self.values[var] = Coupled(labels, tuple(a for ls in labels for a in ls) if item.kind == "weight" else ())
            self.trained |= {var} if item.kind == "weight" else set()
        for eqn in self.jaxpr.eqns:
            operands = [self._read(a) for a in eqn.invars]
            try:
                results = self._rule(eqn)(eqn, operands)
            except Conflict:
                results = self._unknown(eqn, operands)
            # atoms that are gone may come back on another axis, where the value is not zero
            results = [Coupled(r.labels, tuple(sorted(self._zero(r, r.labels)))) for r in results]
            self.values.update(zip(eqn.outvars, results, strict=True))
            read = {a for a in eqn.invars if isinstance(a, ir.Var)}
            self.trained |= set(eqn.outvars) if read and read <= self.trained else set()
        self._block_what_came_together()
        for out in self.jaxpr.outvars:
            for label in self._read(out).labels:
                self.dims.block(label, "it is an axis of the model's result")

    def _block_what_came_together(self) -> None:
        """Blocks what only shows when all atoms are united."""
        depths = {a for label in self.depths for a in self.dims.atoms(label)}
        for label, reason in self.numbered:
            if not self.dims.atoms(label) <= depths:
                self.dims.block(label, reason)
        for zero, counted, reason in self.joined:
            both = self.dims.atoms(tuple(zero)) & self.dims.atoms(tuple(counted)) - set(self.dims.parts)
            self.dims.block(tuple(both), reason)
        for result, reason in self.all_zero:
            axes = Counter(atom for label in result.labels for atom in self.dims.atoms(label))
            twice = {atom for atom, count in axes.items() if count > 1}
            self.dims.block(tuple(self.dims.atoms(result.zero) & twice), reason)

    def uncounted(self) -> tuple[tuple[Label, str], ...]:
        """The axes of sums that lead to anything but a division by the number of their terms, and where."""
        consumer = ir.consumers(ir.live_equations(self.jaxpr))

        def is_mean(var: ir.Var) -> bool:
            return var not in self.jaxpr.outvars and all(
                eqn.outvars[0] in self.means or (eqn.primitive.name in _SPREADS and is_mean(eqn.outvars[0]))
                for eqn in consumer.get(var, ())
            )

        return tuple(found for var, found in self.summed.items() if not is_mean(var))

    def routings(self) -> dict[int, Routing]:
        """Returns the atoms that are experts, and blocks what is blocked for all other atoms."""
        found: dict[int, Routing] = {}
        for routing in find_routings(self.graph):
            operand, axis = routing.choice.invars[0], routing.choice.params["axis"]
            weights = routing.products[0].invars[1]
            if isinstance(operand, ir.Var) and isinstance(weights, ir.Var):
                label = self.values[operand].labels[axis]
                try:
                    self.dims.unify(label, self.values[weights].labels[0])
                except Conflict:
                    self._block([label], routing.choice, "does not choose from all experts at once")
                label = self.dims.resolve(label)
                found |= {label[0]: routing} if len(label) == 1 else {}
        for label, reason in self.blocked:
            if not set(self.dims.resolve(label)) <= set(found):
                self.dims.block(label, reason)
        for var, (label, reason) in self.summed.items():
            if not is_of_softmax(self.producer[var], self._made):
                self.contracted.append((label, reason))
        for label, reason in self.contracted:
            if self.dims.atoms(label) & set(found):
                self.dims.block(label, reason)
        return found

    def members(self, routings: dict[int, Routing]) -> dict[ir.Var, tuple[int, int]]:
        """Returns the weights that are stacked along an axis of experts, and whose they are."""
        found: dict[ir.Var, tuple[int, int]] = {}
        for eqn in ir.live_equations(self.jaxpr):
            label = self.values[eqn.outvars[0]].labels if eqn.primitive.name == "stack" else ()
            atoms = self.dims.resolve(label[eqn.params["axis"]]) if label else ()
            if len(atoms) == 1 and atoms[0] in routings:
                found |= {a: (atoms[0], i) for i, a in enumerate(eqn.invars) if isinstance(a, ir.Var)}
        inputs = set(self.jaxpr.invars)
        return {var: place for var, place in found.items() if var in inputs}

    def _read(self, atom: ir.Atom) -> Coupled:
        if isinstance(atom, ir.Literal):
            return Coupled(self.dims.fresh_all(atom.aval.shape))
        return self.values[atom]

    def _rule(self, eqn: ir.JaxprEqn) -> Callable[..., Sequence[Coupled]]:
        name = eqn.primitive.name
        if name in ELEMENTWISE:
            return self._elementwise
        if name in _ALONG_AN_AXIS:
            return self._along_an_axis
        if name.startswith("reduce_") and "axes" in eqn.params:
            return self._reduce
        if ir.is_op(eqn, "attention"):
            return self._attention
        return getattr(self, f"_{name.replace('-', '_')}", self._unknown)

    def _block(self, labels: Sequence[Label], eqn: ir.JaxprEqn, what: str) -> None:
        for label in labels:
            self.dims.block(label, f"{eqn.primitive.name} {what} at {ir.source_line(eqn)}")

    def _block_but_experts(self, labels: Sequence[Label], eqn: ir.JaxprEqn, what: str) -> None:
        self.blocked += [(label, f"{eqn.primitive.name} {what} at {ir.source_line(eqn)}") for label in labels]

    def _unknown(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        results = [Coupled(self.dims.fresh_all(v.aval.shape)) for v in eqn.outvars]
        for value in (*operands, *results):
            self._block(value.labels, eqn, "has no rule for shrinking it")
        return results

    def _zero(self, value: Coupled, labels: Labels | None = None) -> set[int]:
        """The atoms at whose removed indices a value is zero; of these only the ones on `labels`."""
        zero = self.dims.atoms(value.zero)
        return zero if labels is None else zero & {a for label in labels for a in self.dims.atoms(label)}

    def _zero_of(self, atom: ir.Atom, value: Coupled) -> set[int]:
        """As `_zero`; what is zero everywhere is so at all atoms."""
        return set(range(len(self.dims.sizes))) if is_zero(atom, self.producer) else self._zero(value)

    def _elementwise(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        if eqn.primitive.name == "optimization_barrier":
            return operands
        summed = self._mean_over(eqn)
        if summed is not None:
            self.means[eqn.outvars[0]] = summed
        whole = [o.labels for o in operands if len(o.labels) == eqn.outvars[0].aval.ndim]
        labels = tuple(self._united(eqn, [ls for ls in axis if ls]) for axis in zip(*whole, strict=True))
        result = Coupled(labels, tuple(sorted(self._zero_elementwise(eqn, operands))))
        if eqn.primitive.name in _ZERO_IF_ALL:
            # x_i - x_j: each side is zero along its own axis, which may turn out to be the same atom as the other
            self.all_zero.append((result, f"{eqn.primitive.name} has it on two axes at {ir.source_line(eqn)}"))
        return [result]

    def _mean_over(self, eqn: ir.JaxprEqn) -> Label | None:
        """What was summed over, where a sum is divided by the number of its terms, or multiplied by one over it."""
        name = eqn.primitive.name
        sides = {"div": [(0, 1)], "mul": [(0, 1), (1, 0)]}.get(name, [])
        for atom, number in ((eqn.invars[i], eqn.invars[j]) for i, j in sides):
            factor, source = uniform_value(number, self.producer), self._made(atom)
            while source is not None and source.primitive.name in _SPREADS:
                source = self._made(source.invars[0])
            if factor is None or source is None or source.outvars[0] not in self.summed:
                continue
            summed, _ = self.summed[source.outvars[0]]
            count = self.dims.size(summed)
            terms = float(factor) if name == "div" else 1 / float(factor) if factor else 0.0
            if isinstance(number, ir.Literal) and not ir.is_symbolic(count) and int(count) > 1:
                return summed if abs(terms - int(count)) < _SAME_COUNT * int(count) else None
        return None

    def _made(self, atom: ir.Atom) -> ir.JaxprEqn | None:
        return self.producer.get(atom) if isinstance(atom, ir.Var) else None

    def _united(self, eqn: ir.JaxprEqn, labels: Sequence[Label]) -> Label:
        """Makes one axis of those that an elementwise operation puts side by side; axes of size 1 are spread."""
        for other in labels[1:]:
            try:
                self.dims.unify(labels[0], other)
            except Conflict:
                self._block([labels[0], other], eqn, "reads it in two ways")
        return labels[0] if labels else ()

    def _zero_elementwise(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> set[int]:
        name = eqn.primitive.name
        zero = [self._zero_of(atom, o) for atom, o in zip(eqn.invars, operands, strict=True)]
        if name in _ZERO_IF_ANY:
            return reduce(operator.or_, zero)
        if name in _ZERO_IF_ALL:
            return reduce(operator.and_, zero[1:] if name == "select_n" else zero)
        if name == "integer_pow" and eqn.params["y"] <= 0:
            return set()
        return zero[0] if name in _ZERO_IF_FIRST | _ZERO_AT_ZERO else set()

    def _along_an_axis(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        axis = eqn.params[_ALONG_AN_AXIS[eqn.primitive.name]]
        for operand in operands:
            self._block([operand.labels[axis]], eqn, "runs along it")
        if eqn.primitive.name == "unstack":
            kept = tuple(label for i, label in enumerate(operands[0].labels) if i != axis)
            return [Coupled(kept, operands[0].zero)] * len(eqn.outvars)
        return [Coupled(o.labels) for o in operands]

    def _broadcast_in_dim(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        source = {axis: i for i, axis in enumerate(eqn.params["broadcast_dimensions"])}
        labels = tuple(
            operands[0].labels[source[i]] if i in source and ir.same_dim(before[source[i]], n) else self.dims.fresh(n)
            for i, n in enumerate(after)
        )
        return [Coupled(labels, operands[0].zero)]

    def _reshape(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        if eqn.params.get("dimensions") is not None:
            return self._unknown(eqn, operands)
        return [Coupled(self.dims.regroup(operands[0].labels, eqn.outvars[0].aval.shape), operands[0].zero)]

    def _transpose(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        (x,) = operands
        return [Coupled(tuple(x.labels[i] for i in eqn.params["permutation"]), x.zero)]

    def _squeeze(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        (x,) = operands
        return [Coupled(tuple(ls for i, ls in enumerate(x.labels) if i not in eqn.params["dimensions"]), x.zero)]

    def _expand_dims(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        kept = iter(operands[0].labels)
        ndim = eqn.outvars[0].aval.ndim
        labels = tuple(() if i in eqn.params["dimensions"] else next(kept) for i in range(ndim))
        return [Coupled(labels, operands[0].zero)]

    def _iota(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        """Numbers of channels stay what they were (`shrink`): frequencies are made of them."""
        labels = self.dims.fresh_all(eqn.outvars[0].aval.shape)
        self.numbered.append((labels[eqn.params["dimension"]], f"iota numbers it at {ir.source_line(eqn)}"))
        return [Coupled(labels)]

    def _reduce(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        (x, *_), axes = operands, eqn.params["axes"]
        summed = [x.labels[i] for i in axes]
        for label in summed:
            if eqn.primitive.name != "reduce_sum" or not self.dims.atoms(label) <= self._zero(x):
                block = self._block_but_experts if eqn.primitive.name in _OF_SOFTMAX else self._block
                block([label], eqn, "would count what is removed from it")
        if eqn.primitive.name == "reduce_sum":
            self._sum(eqn, summed)
        kept = tuple(label for i, label in enumerate(x.labels) if i not in axes)
        return [Coupled(kept, x.zero if eqn.primitive.name == "reduce_sum" else ())] * len(eqn.outvars)

    def _sum(self, eqn: ir.JaxprEqn, labels: Sequence[Label]) -> None:
        where = f"{eqn.primitive.name} sums over it at {ir.source_line(eqn)}, and is not divided by its size"
        self.summed[eqn.outvars[0]] = tuple(a for label in labels for a in label), where

    def _dot_general(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        left, right = operands
        einsum = Einsum.of(eqn)
        for i, j in einsum.contracted:
            self.dims.unify(left.labels[i], right.labels[j])
            if not self.dims.atoms(left.labels[i]) <= self._zero(left) | self._zero(right):
                self._block([left.labels[i]], eqn, "sums over it and neither side is a weight")
        where = f"dot_general sums over it at {ir.source_line(eqn)}"
        self.contracted += [(left.labels[i], where) for i, _ in einsum.contracted]
        if not self.trained & set(eqn.invars):
            self._sum(eqn, [left.labels[i] for i, _ in einsum.contracted])
        labels: list[Label] = [()] * eqn.outvars[0].aval.ndim
        for side, axes in ((left, einsum.lhs), (right, einsum.rhs)):
            for i, out in enumerate(axes):
                if out is not None and labels[out]:
                    self.dims.unify(labels[out], side.labels[i])
                elif out is not None:
                    labels[out] = side.labels[i]
        zero = set()
        for side, axes in ((left, einsum.lhs), (right, einsum.rhs)):
            zero |= self._zero(side, tuple(side.labels[i] for i, out in enumerate(axes) if out is not None))
        return [Coupled(tuple(labels), tuple(sorted(zero)))]

    def _slice(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        (x,), p, labels = operands, eqn.params, []
        for axis, size in enumerate(eqn.invars[0].aval.shape):
            start, limit = p["start_indices"][axis], p["limit_indices"][axis]
            strided = p["strides"] is not None and p["strides"][axis] != 1
            if ir.same_dim(limit - start, size) and not strided:
                labels.append(x.labels[axis])
            elif strided or ir.is_symbolic(limit) or ir.is_symbolic(start):
                labels.append(self.dims.fresh(eqn.outvars[0].aval.shape[axis]))
                self._block([x.labels[axis], labels[-1]], eqn, "takes part of it")
            else:
                labels.append(self.dims.cut(x.labels[axis], start, limit))
        return [Coupled(tuple(labels), x.zero)]

    def _stack(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        axis = eqn.params["axis"]
        together = zip(*(o.labels for o in operands), strict=True)
        labels = [self._united(eqn, [ls for ls in same if ls]) for same in together]
        new = self.dims.fresh(eqn.outvars[0].aval.shape[axis])
        self._block_but_experts([new], eqn, "makes it")
        zero = reduce(operator.and_, (self._zero(o) for o in operands))
        return [Coupled((*labels[:axis], new, *labels[axis:]), tuple(sorted(zero)))]

    def _split(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        (x,), axis, start, results = operands, eqn.params["axis"], 0, []
        for size in eqn.params["sizes"]:
            piece = self.dims.cut(x.labels[axis], start, start + size)
            results.append(Coupled((*x.labels[:axis], piece, *x.labels[axis + 1 :]), x.zero))
            start += size
        return results

    def _concatenate(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        axis, first = eqn.params["dimension"], operands[0]
        for other in operands[1:]:
            for i, (left, right) in enumerate(zip(first.labels, other.labels, strict=True)):
                if i != axis:
                    self.dims.unify(left, right)
        if ir.is_symbolic(eqn.outvars[0].aval.shape[axis]):
            raise Conflict
        joined = self.dims.join([o.labels[axis] for o in operands])
        labels = (*first.labels[:axis], joined, *first.labels[axis + 1 :])
        atoms = [self.dims.atoms(o.labels[axis]) for o in operands]
        own = reduce(operator.or_, (each & self._zero(o) for each, o in zip(atoms, operands, strict=True)))
        counted = reduce(operator.or_, (each - self._zero(o) for each, o in zip(atoms, operands, strict=True)))
        self.joined.append((own, counted, f"concatenate has it zero and not zero at {ir.source_line(eqn)}"))
        zero = reduce(operator.and_, (self._zero(o) for o in operands)) | own
        return [Coupled(labels, tuple(sorted(zero)))]

    def _top_k(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        (x,), axis = operands, eqn.params["axis"]
        self._block_but_experts([x.labels[axis]], eqn, "chooses from it")
        chosen = self.dims.fresh(eqn.outvars[0].aval.shape[axis])
        self._block([chosen], eqn, "chooses it")
        return [Coupled((*x.labels[:axis], chosen, *x.labels[axis + 1 :]))] * 2

    def _gather(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        """Rows of a table: the axes that are looked up by index are blocked, the others go on."""
        (table, index), numbers = operands, eqn.params["dimension_numbers"]
        if numbers.operand_batching_dims or numbers.start_indices_batching_dims:
            raise Conflict
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        taken = [i for i in range(len(shape)) if i in numbers.start_index_map or not ir.same_dim(sizes[i], shape[i])]
        self._block([table.labels[i] for i in taken], eqn, "looks it up by index")
        self._block([index.labels[-1]], eqn, "looks it up by index")
        offsets = iter(i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims)
        batch = iter(index.labels[:-1])
        labels = []
        for i, n in enumerate(eqn.outvars[0].aval.shape):
            if i not in numbers.offset_dims:
                labels.append(next(batch))
                continue
            axis = next(offsets)
            labels.append(table.labels[axis] if axis not in taken else self.dims.fresh(n))
            if axis in taken:
                self._block(labels[-1:], eqn, "looks it up by index")
        return [Coupled(tuple(labels), tuple(sorted(self._zero(table, tuple(labels)))))]

    def _scatter(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        """Rows written into a table: the axes that are found by index are blocked, the others join the rows'."""
        table, index, rows = operands
        numbers = eqn.params["dimension_numbers"]
        if numbers.operand_batching_dims or numbers.scatter_indices_batching_dims:
            raise Conflict
        self._block([index.labels[-1]], eqn, "finds a place by it")
        found = {*numbers.scatter_dims_to_operand_dims, *numbers.inserted_window_dims}
        offsets = (i for i in range(len(table.labels)) if i not in numbers.inserted_window_dims)
        batch = iter(index.labels[:-1])
        whole, written = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
        for i, label in enumerate(rows.labels):
            if i not in numbers.update_window_dims:
                self.dims.unify(label, next(batch))
                continue
            axis = next(offsets)
            if axis not in found and ir.same_dim(written[i], whole[axis]):
                self.dims.unify(table.labels[axis], label)
            else:
                self._block([table.labels[axis], label], eqn, "writes part of it")
        self._block_but_experts([table.labels[i] for i in found], eqn, "finds a place by it")
        zero = self._zero_of(eqn.invars[0], table) & self._zero(rows, table.labels)
        return [Coupled(table.labels, tuple(sorted(zero)))]

    _scatter_add = _scatter

    def _ragged_dot_general(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        """Rows [m, k] by weights [groups, k, n] or [groups, n, k]; which rows are whose is told by number."""
        summed = grouped_sum(eqn)
        if summed is None:
            raise Conflict
        rows, weights, sizes = operands
        self.dims.unify(rows.labels[1], weights.labels[summed])
        if not self.dims.atoms(rows.labels[1]) <= self._zero(rows) | self._zero(weights):
            self._block([rows.labels[1]], eqn, "sums over it and neither side is a weight")
        self.dims.unify(weights.labels[0], sizes.labels[0])
        self._block_but_experts([weights.labels[0]], eqn, "finds a group by number in it")
        labels = rows.labels[0], weights.labels[3 - summed]
        return [Coupled(labels, tuple(sorted(self._zero(weights, labels[1:]) | self._zero(rows, labels[:1]))))]

    def _attention(self, eqn: ir.JaxprEqn, operands: list[Coupled]) -> list[Coupled]:
        """Axes of q are [b, t, k, g, d], of k [b, s, k, d], of v [b, s, k, e], of terms [b, k, g, t, s]."""
        q, k, v, *terms = operands
        batch, queries, heads, groups, depth = q.labels
        keys, features = v.labels[1], v.labels[3]
        for left, right in ((k.labels, (batch, keys, heads, depth)), (v.labels, (batch, keys, heads, features))):
            for a, b in zip(left, right, strict=True):
                self.dims.unify(a, b)
        for term in terms:
            for own, label in zip(term.labels, (batch, heads, groups, queries, keys), strict=True):
                if own:
                    self.dims.unify(own, label)
        self._block([keys], eqn, "normalizes over it")
        counted = self.dims.atoms(depth) - self._zero(q) - self._zero(k) - set(self.dims.parts)
        self._block([(atom,) for atom in sorted(counted)], eqn, "sums over it and neither side is zero there")
        self.heads.append(heads)
        self.features.append(features)
        self.depths.append(depth)
        zero = self._zero(v, (heads, features))
        return [Coupled((batch, queries, heads, groups, features), tuple(sorted(zero)))]
