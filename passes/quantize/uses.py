"""How a graph uses its weights: which are multiplied with activations, and over which of their axes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import Axes, Einsum, Labels, NoLabels
from xlathe.graph import Graph

COMPUTE_DTYPES = ("bfloat16", "float16")
"""A product may round its weight to these first: it is quantized instead."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight become output channels, and which are summed over, each from outer to inner.

    Axes of size 1 are free.
    """

    free: tuple[int, ...]
    contracted: tuple[int, ...]

    def shape(self, weight: Any) -> tuple[int, int]:
        """Returns [n, k] of the codes."""
        n, k = (math.prod(weight.shape[i] for i in axes) for axes in (self.free, self.contracted))
        return n, k

    def matrix(self, weight: Any) -> np.ndarray:
        """Returns a weight as float32 [n, k]."""
        return self.flat(np.asarray(weight, np.float32))

    def flat(self, weight: Any) -> Any:
        """Returns a NumPy or JAX array as [n, k]."""
        return weight.transpose(*self.free, *self.contracted).reshape(self.shape(weight))

    def weight(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        """Undoes `flat`."""
        order = (*self.free, *self.contracted)
        return matrix.reshape([shape[i] for i in order]).transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class Use:
    """An equation that reads a weight or a view of it: as which operand, and the labels of that operand's axes."""

    eqn: ir.JaxprEqn
    side: int
    labels: Labels

    @property
    def is_product(self) -> bool:
        return self.eqn.primitive.name == "dot_general"

    @property
    def is_lookup(self) -> bool:
        """Whether whole rows of a matrix are looked up."""
        if self.eqn.primitive.name != "gather" or self.side or self.eqn.invars[0].aval.ndim != 2:
            return False
        numbers, width = self.eqn.params["dimension_numbers"], self.eqn.invars[0].aval.shape[1]
        return (
            tuple(numbers.collapsed_slice_dims) == (0,)
            and tuple(numbers.start_index_map) == (0,)
            and tuple(numbers.offset_dims) == (self.eqn.outvars[0].aval.ndim - 1,)
            and tuple(self.eqn.params["slice_sizes"]) == (1, width)
        )


def plan_weights(graph: Graph, names: list[str]) -> tuple[dict[str, Layout], tuple[str, ...]]:
    """Returns the layout of every weight among `names` that can be quantized, and why others can not."""
    finder = Uses(graph)
    plans, misses = {}, []
    for name in names:
        aval = graph.aval(name)
        if aval.ndim < 2 or not jnp.issubdtype(aval.dtype, jnp.floating):
            continue
        try:
            layout = finder.layout(name)
        except _Unusable as reason:
            misses.append(f"{name}: {reason}")
            continue
        if layout is not None:
            plans[name] = layout
    return plans, tuple(misses)


class _Unusable(Exception):
    """Why a weight cannot be quantized."""


class Uses:
    """Finds what is done with each weight, through views of it."""

    def __init__(self, graph: Graph) -> None:
        self.vars = {i.name: v for i, v in zip(graph.inputs, graph.jaxpr.invars, strict=True)}
        self.consumer = ir.consumers(ir.live_equations(graph.jaxpr))
        self.activations = _activations(graph)

    def layout(self, name: str) -> Layout | None:
        """Returns the one layout of all products with a weight; None where there is no product."""
        labels, found = self.of(name)
        products = [use for use in found if use.is_product]
        lookups = self._lookups(name, found)
        if not products:
            return None
        if len(products) + len(lookups) < len(found):
            other = next(use.eqn for use in found if use not in products and use not in lookups)
            raise _Unusable(f"{other.primitive.name} uses it too at {ir.source_line(other)}")
        layout, *others = {self._product_layout(use, labels) for use in products}
        if others:
            raise _Unusable("it is multiplied over different axes")
        if lookups and layout != Layout((0,), (1,)):
            raise _Unusable("its rows are looked up but products sum over other axes")
        return layout

    def is_looked_up(self, name: str) -> bool:
        """Says whether whole rows of a weight are looked up, and nothing else is done with it."""
        found = self.of(name)[1]
        return bool(found) and len(self._lookups(name, found)) == len(found)

    def _lookups(self, name: str, found: list[Use]) -> list[Use]:
        return [use for use in found if use.is_lookup and use.eqn.invars[0] is self.vars[name]]

    def of(self, name: str) -> tuple[Labels, list[Use]]:
        """Returns the labels of a weight's axes, and every use of it under views."""
        axes, var = Axes(), self.vars[name]
        labels = axes.fresh_all(var.aval.shape)
        return labels, self._under_views(var, labels, axes, rounded=False)

    def _under_views(self, var: ir.Var, labels: Labels, axes: Axes, *, rounded: bool) -> list[Use]:
        """rounded: whether the view was rounded to a compute dtype."""
        found = []
        for eqn in self.consumer.get(var, []):
            still_rounded = _is_rounded_after(eqn, rounded)
            lower = _below(eqn, var, labels, axes)
            if lower is None:
                found.append(Use(eqn, next(i for i, a in enumerate(eqn.invars) if a is var), labels))
            else:
                found += self._under_views(eqn.outvars[0], lower, axes, rounded=still_rounded)
        return found

    def _product_layout(self, use: Use, original: Labels) -> Layout:
        """Reads the roles of the weight's own axes off the labels of a view of it."""
        line = ir.source_line(use.eqn)
        if use.eqn.invars[1 - use.side] not in self.activations:
            raise _Unusable(f"it is multiplied with what is made of weights alone at {line}")
        if use.eqn.params["dimension_numbers"][1][use.side]:
            raise _Unusable(f"it is multiplied one matrix a batch entry at {line}")
        contracted = sorted(Einsum.of(use.eqn).contracted, key=lambda pair: pair[1 - use.side])
        summed = [pair[use.side] for pair in contracted]
        kept = [i for i in range(len(use.labels)) if i not in summed]
        position = {atom: axis for axis, label in enumerate(original) for atom in label}
        ones = tuple(axis for axis, label in enumerate(original) if not label)
        free, over = (tuple(position[a] for i in axes for a in use.labels[i]) for axes in (kept, summed))
        return Layout((*ones, *free), over)


def _activations(graph: Graph) -> set[ir.Atom]:
    """Returns the values that depend on arguments, or on their sizes."""
    kinds = zip(graph.inputs, graph.jaxpr.invars, strict=True)
    made: set[ir.Atom] = {var for item, var in kinds if item.kind in ("arg", "state")}
    for eqn in graph.jaxpr.eqns:
        sizes = (dim for out in eqn.outvars for dim in out.aval.shape)
        if any(isinstance(a, ir.Var) and a in made for a in eqn.invars) or any(map(ir.is_symbolic, sizes)):
            made.update(eqn.outvars)
    return made


def _below(eqn: ir.JaxprEqn, var: ir.Var, labels: Labels, axes: Axes) -> Labels | None:
    """Returns the labels of a view's result; None where the equation is no view or divides an axis."""
    try:
        lower = axes.forward(eqn, labels) if eqn.invars[0] is var else None
    except NoLabels:
        return None
    return None if lower is None or any(axes.resolve(label) != label for label in lower) else lower


def _is_rounded_after(eqn: ir.JaxprEqn, rounded: bool) -> bool:
    """Says whether a weight is rounded to a compute dtype after an equation; rounded: before it.

    Raises _Unusable for a cast that quantizing a product cannot take the place of.
    """
    source, result, name = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype, eqn.primitive.name
    if name != "reduce_precision" and (name != "convert_element_type" or source == result):
        return rounded
    if name == "convert_element_type" and not rounded:
        if _holds(result, source):
            return False
        if result.name in COMPUTE_DTYPES:
            return True
    raise _Unusable(f"{name} to {result.name} changes its values at {ir.source_line(eqn)}")


def _holds(result: Any, source: Any) -> bool:
    """Whether a dtype has every value of a float dtype."""
    if not jnp.issubdtype(result, jnp.floating):
        return False
    new, old = jnp.finfo(result), jnp.finfo(source)
    return bool(new.nmant >= old.nmant and new.maxexp >= old.maxexp and new.minexp <= old.minexp)
