"""Replace weights by quantized ones wherever they are multiplied with activations."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import Axes, Einsum, Label, NoLabels
from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph, Input, Recipe, Record
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.passes.quantize.rtn import RoundToNearest
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass
from xlathe.rewrite import Replacement, rewrite

SCHEMES = ("int8",)
GRANULARITIES = ("channel",)


@final
@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Weight-only quantization: input `w` becomes `w.codes` and `w.scale`, made by a recipe from `w`.

    scheme: `int8`, symmetric. granularity: `channel`, one scale an output channel. weights: a regular expression
    that the names of the weights must match in full.

    A weight is quantized where every use of it is a product over the same axes, or a look-up of whole rows (a tied
    embedding). Raises OptionError for an unknown scheme or granularity, and where no weight matches.
    """

    keeps: ClassVar[Keeps] = APPROXIMATE

    scheme: str = "int8"
    granularity: str = "channel"
    weights: str = ".*"

    def __post_init__(self) -> None:
        for value, known in ((self.scheme, SCHEMES), (self.granularity, GRANULARITIES)):
            if value not in known:
                raise OptionError(f"quantize: {value!r} is not known{did_you_mean(value, known)}")
        try:
            re.compile(self.weights)
        except re.error as error:
            raise OptionError(f"quantize: weights={self.weights!r} is no regular expression: {error}") from None

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        chosen = [name for name in graph.names("weight") if re.fullmatch(self.weights, name)]
        plans, misses = plan_weights(graph, chosen)
        if not plans:
            raise OptionError(f"quantize: weights={self.weights!r} matches no weight that is multiplied with "
                              f"activations; the graph has {', '.join(graph.names('weight')[:8])}, ...")  # fmt: skip
        result = _replace(graph, plans)
        return result, Record("quantize", hits={"weight": len(plans)}, misses=misses)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight is used: which of its axes become output channels, and which are summed over."""

    free: tuple[int, ...]
    contracted: tuple[int, ...]

    def shape(self, weight: Any) -> tuple[int, int]:
        """Returns [n, k] of the codes."""
        n, k = (int(np.prod([weight.shape[i] for i in axes])) for axes in (self.free, self.contracted))
        return n, k


def plan_weights(graph: Graph, names: list[str]) -> tuple[dict[str, Layout], tuple[str, ...]]:
    """Returns the layout of every weight among `names` that can be quantized, and why others can not."""
    finder = _Uses(graph)
    plans, misses = {}, []
    for name in names:
        if graph.aval(name).ndim < 2:
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


class _Uses:
    """Finds what is done with each weight, through views of it."""

    def __init__(self, graph: Graph) -> None:
        self.vars = {i.name: v for i, v in zip(graph.inputs, graph.jaxpr.invars, strict=True)}
        self.consumer = ir.consumers(ir.live_equations(graph.jaxpr))

    def layout(self, name: str) -> Layout | None:
        """Returns the one layout of all products with a weight; None where it is only looked up."""
        axes, var = Axes(), self.vars[name]
        labels = tuple(axes.fresh(n) or (-1,) for n in var.aval.shape)
        layouts: set[Layout] = set()
        looked_up, others = False, []
        for use, side, use_labels in self.uses(var, labels, axes):
            if use.primitive.name == "dot_general":
                layouts.add(_layout(use, side, use_labels, labels))
            elif use.primitive.name == "gather" and _looks_up_rows(use, var):
                looked_up = True
            else:
                others.append(use)
        if layouts and others:
            raise _Unusable(f"{others[0].primitive.name} uses it too at {ir.source_line(others[0])}")
        if len(layouts) > 1:
            raise _Unusable("it is multiplied over different axes")
        layout = next(iter(layouts), None)
        if layout is not None and looked_up and layout != Layout((0,), (1,)):
            raise _Unusable("its rows are looked up but products sum over other axes")
        return layout

    def uses(self, var: ir.Var, labels: Any, axes: Axes) -> list[tuple[ir.JaxprEqn, int, Any]]:
        """Returns every use of a weight under views, which operand it is there, and its labels."""
        found = []
        for eqn in self.consumer.get(var, []):
            try:
                lower = axes.forward(eqn, labels) if eqn.invars[0] is var else None
            except NoLabels:
                lower = None
            if lower is None or any(axes.resolve(x) != x for x in lower if x != (-1,)):
                found.append((eqn, next(i for i, a in enumerate(eqn.invars) if a is var), labels))
            else:
                found += self.uses(eqn.outvars[0], lower, axes)
        return found


def _looks_up_rows(eqn: ir.JaxprEqn, var: ir.Var) -> bool:
    numbers = eqn.params["dimension_numbers"]
    return (
        eqn.invars[0] is var
        and var.aval.ndim == 2
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == (eqn.outvars[0].aval.ndim - 1,)
    )


def _layout(eqn: ir.JaxprEqn, side: int, labels: tuple[Label, ...], original: tuple[Label, ...]) -> Layout:
    """Reads the roles of the weight's own axes off the labels of a view of it."""
    batch = eqn.params["dimension_numbers"][1][side]
    if batch:
        raise _Unusable(f"it is multiplied one matrix a batch entry at {ir.source_line(eqn)}")
    einsum = Einsum.of(eqn)
    summed = [pair[side] for pair in sorted(einsum.contracted, key=lambda pair: pair[1 - side])]
    kept = [i for i in range(len(labels)) if i not in summed]
    position = {atom: axis for axis, label in enumerate(original) for atom in label}
    free = tuple(position[a] for i in kept for a in labels[i])
    contracted = tuple(position[a] for i in summed for a in labels[i])
    if sorted((*free, *contracted)) != list(range(len(original))):
        raise _Unusable(f"a view of it is multiplied at {ir.source_line(eqn)}")
    return Layout(free, contracted)


def _replace(graph: Graph, plans: Mapping[str, Layout]) -> Graph:
    """Adds codes and scales as inputs, replaces the products, and drops the weights."""
    names = list(plans)
    avals = []
    for name in names:
        n, k = plans[name].shape(graph.aval(name))
        avals += [jax.ShapeDtypeStruct((n, k), jnp.int8), jax.ShapeDtypeStruct((n,), jnp.float32)]
    count = len(graph.jaxpr.invars)
    extended = ir.trace(
        lambda *xs: ir.evaluate(graph.jaxpr, xs[:count]), *(v.aval for v in graph.jaxpr.invars), *avals
    )
    inputs = [*graph.inputs, *(Input(f"{name}.{part}", "weight") for name in names for part in ("codes", "scale"))]
    finder = _Uses(graph.replace(jaxpr=extended, inputs=tuple(inputs)))
    replacements = {}
    for name in names:
        var, codes, scale = (finder.vars[x] for x in (name, f"{name}.codes", f"{name}.scale"))
        axes = Axes()
        labels = tuple(axes.fresh(n) or (-1,) for n in var.aval.shape)
        for eqn, side, _ in finder.uses(var, labels, axes):
            emit = _lookup(eqn) if eqn.primitive.name == "gather" else _product(eqn, side)
            other = eqn.invars[1 - side]
            replacements[eqn.outvars[0]] = Replacement((other, codes, scale), emit)
    jaxpr, kept = ir.drop_dead(rewrite(extended, replacements), keep=lambda i: inputs[i].kind in ("arg", "state"))
    recipes = [
        Recipe(name, (f"{name}.codes", f"{name}.scale"), RoundToNearest(plans[name].free, plans[name].contracted))
        for name in names
    ]
    return graph.replace(
        jaxpr=jaxpr, inputs=tuple(inputs[i] for i in kept), weights=graph.weights.derive(*recipes)
    )


def _product(eqn: ir.JaxprEqn, side: int) -> Any:
    """Emits the product of the other operand with codes [n, k], in the result's own layout."""
    einsum = Einsum.of(eqn)
    other, weight = eqn.invars[1 - side].aval, eqn.invars[side].aval
    summed = sorted(pair[1 - side] for pair in einsum.contracted)
    kept = [i for i in range(other.ndim) if i not in summed]
    weight_summed = {pair[side] for pair in einsum.contracted}
    channels = [n for i, n in enumerate(weight.shape) if i not in weight_summed]
    out_dtype = str(eqn.outvars[0].aval.dtype)

    def emit(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        rows = jnp.transpose(x, (*kept, *summed)).reshape(*(x.shape[i] for i in kept), codes.shape[1])
        y = quantized_dot(rows, codes, scale, out_dtype=out_dtype)
        y = y.reshape(*y.shape[:-1], *channels)
        return y if side == 1 else jnp.moveaxis(y, range(len(kept)), range(-len(kept), 0))

    return emit


def _lookup(eqn: ir.JaxprEqn) -> Any:
    """Emits the look-up of quantized rows, times their scales."""

    def emit(index: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        ids = index[..., 0]
        rows = jnp.take(codes, ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * jnp.take(scale, ids, mode="clip")[..., None]).astype(eqn.outvars[0].aval.dtype)

    return emit
