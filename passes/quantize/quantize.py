"""Replace weights by quantized ones wherever they are multiplied with activations."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph, Recipe, Record
from xlathe.ops.quantized_dot import BLOCK, quantized_dot
from xlathe.passes.quantize.experts import EachExpert, Experts, emit_product, find_experts
from xlathe.passes.quantize.schemes import Int4Groups, Int8Channels, Scheme
from xlathe.passes.quantize.uses import Layout, Uses, plan_weights
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass
from xlathe.rewrite import Replacement, rewrite_graph

GRANULARITIES = {"int8": "channel", "int4": "group"}
"""What shares a scale, by scheme."""
ACTIVATIONS = ("int8",)
GROUP = 32
SHOWN = 5  # near misses, or names, in a message


@final
@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Replaces input `w` by `w.codes`, `w.scale` and maybe `w.zero`, made by a recipe from `w`.

    scheme: `int8` or `int4`. granularity: what shares a scale; an output channel (`channel`) in int8, and in int4 a
    group (`group`) of successive weights of a channel. weights: a regular expression that the names of the weights
    must match in full. The rest is for int4 alone. group: the weights in a group, 32 if it is not given. symmetric:
    false adds a zero point a group. activations: none, they stay as they are, or `int8`, they are rounded to 8 bits, a
    block of 32 at a time; another scheme, with results of its own.

    The experts of a mixture (`jax.lax.ragged_dot` with a stack of them) are quantized each by itself, and lie in one
    array with the others: `w.codes` [experts, ...], where `w` has a star for the expert's number.

    A weight is quantized where every use of it is a product with activations over the same axes, or a look-up of
    whole rows (a tied embedding). A product that rounds its weight to bfloat16 or float16 first takes the quantized
    one instead; any other loss of precision on the way is kept, and the weight with it.

    Raises OptionError for options that are unknown or do not go together, where no weight can be quantized, and for a
    group that does not divide one.
    """

    keeps: ClassVar[Keeps] = APPROXIMATE

    scheme: str = "int8"
    granularity: str | None = None
    weights: str = ".*"
    group: int | None = None
    symmetric: bool = True
    activations: str | None = None

    def __post_init__(self) -> None:
        _known(self.scheme, GRANULARITIES)
        _known(self.granularity, (None, *GRANULARITIES.values()))
        _known(self.activations, (None, *ACTIVATIONS))
        _together(self)
        try:
            re.compile(self.weights)
        except re.error as error:
            raise OptionError(f"quantize: weights={self.weights!r} is no regular expression: {error}") from None

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        chosen = [name for name in graph.names("weight") if re.fullmatch(self.weights, name)]
        plans, misses = plan_weights(graph, chosen)
        experts, refused = find_experts(graph, chosen)
        misses += refused
        if not plans and not experts:
            nearly = _nearly(misses) or _listed(graph.names("weight"))
            raise OptionError(
                f"quantize: weights={self.weights!r} matches no weight that is multiplied with activations; {nearly}"
            )
        scheme = self._scheme()
        for name, layout in plans.items():
            scheme.check(name, graph.aval(name).shape, layout.shape(graph.aval(name))[1])
        for name, layout in ((name, group.layout) for group in experts for name in group.names):
            scheme.check(name, graph.aval(name).shape, layout.shape(graph.aval(name))[1])
        hits = {"weight": len(plans)} | ({"expert": sum(len(group.names) for group in experts)} if experts else {})
        result = _replace(graph, plans, experts, scheme)
        notes = _unseen_experts(graph, context) if experts and not graph.is_step else ()
        return result, Record("quantize", hits=hits, misses=misses, notes=notes)

    def _scheme(self) -> Scheme:
        if self.scheme == "int8":
            return Int8Channels()
        return Int4Groups(self.group or GROUP, self.symmetric, self.activations)


def _unseen_experts(graph: Graph, context: Context) -> tuple[str, ...]:
    """Says which experts the calibration, if there is one, never reached: what it tells does not hold for them."""
    from xlathe.passes.observe import observe, unseen  # it reads products as this package does

    if not len(context.calibration):
        return ()
    found = unseen(observe(graph, context.calibration, progress=context.progress))
    return tuple(f"{name}: no token of the calibration chose this expert" for name in found)


def _known(value: str | None, known: Iterable[str | None]) -> None:
    if value not in known:
        raise OptionError(f"quantize: {value!r} is not known{did_you_mean(str(value), [k for k in known if k])}")


def _together(options: Quantize) -> None:
    """Raises OptionError where options do not fit the scheme, or the group not the activations."""
    scheme, group = options.scheme, options.group
    if options.granularity not in (None, GRANULARITIES[scheme]):
        raise OptionError(
            f"quantize: granularity={options.granularity} does not go with scheme={scheme}, expected "
            f"{GRANULARITIES[scheme]}"
        )
    if scheme != "int4" and (group is not None or options.activations or not options.symmetric):
        raise OptionError(f"quantize: group, symmetric and activations are options of scheme=int4, not of {scheme}")
    step = BLOCK if options.activations else 2  # two codes a byte
    if group is not None and (group < step or group % step):
        also = " where activations are rounded" if options.activations else ""
        raise OptionError(f"quantize: group={group}: expected a positive multiple of {step}{also}")


def _nearly(misses: Sequence[str]) -> str:
    more = [f"and {len(misses) - SHOWN} more"] if len(misses) > SHOWN else []
    return "nearly: " + "; ".join([*misses[:SHOWN], *more]) if misses else ""


def _listed(names: Sequence[str]) -> str:
    return "the graph has " + ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])


def _replace(graph: Graph, plans: Mapping[str, Layout], experts: Sequence[Experts], scheme: Scheme) -> Graph:
    """Adds codes, scales and zero points as inputs, replaces the products, and drops the weights."""
    parts = {name: scheme.parts(*layout.shape(graph.aval(name))) for name, layout in plans.items()}
    targets = {name: tuple(f"{name}.{part}" for part in avals) for name, avals in parts.items()}
    finder, replacements = Uses(graph), {}
    for name, made in targets.items():
        for use in finder.of(name)[1]:
            emit = _product(use.eqn, use.side, scheme) if use.is_product else _lookup(use.eqn, scheme)
            other = use.eqn.invars[1 - use.side]
            replacements[use.eqn.outvars[0]] = Replacement((other,), emit, added=made)
    added = {f"{name}.{part}": aval for name, avals in parts.items() for part, aval in avals.items()}
    recipes = [Recipe(name, targets[name], scheme.recipe(layout)) for name, layout in plans.items()]
    for group in experts:
        stacked = _stacked(graph, group, scheme)
        added |= stacked
        made = tuple(stacked)
        emit = emit_product(group.eqn, scheme.attributes())
        replacements[group.eqn.outvars[0]] = Replacement((group.rows, group.sizes), emit, added=made)
        each = EachExpert((scheme.recipe(group.layout),) * len(group.names))
        recipes.append(Recipe(group.names[0], made, each, group.names[1:]))
    return rewrite_graph(graph, replacements, added).replace(weights=graph.weights.derive(*recipes))


def _stacked(graph: Graph, group: Experts, scheme: Scheme) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the inputs that replace the matrices of experts."""
    parts = scheme.parts(*group.layout.shape(graph.aval(group.names[0])))
    count = len(group.names)
    return {f"{group.stem}.{part}": jax.ShapeDtypeStruct((count, *a.shape), a.dtype) for part, a in parts.items()}


def _product(eqn: ir.JaxprEqn, side: int, scheme: Scheme) -> Any:
    """Emits the product of the other operand with a quantized weight, in the result's own layout."""
    einsum = Einsum.of(eqn)
    other, weight = eqn.invars[1 - side].aval, eqn.invars[side].aval
    summed = sorted(pair[1 - side] for pair in einsum.contracted)
    kept = [i for i in range(other.ndim) if i not in summed]
    weight_summed = {pair[side] for pair in einsum.contracted}
    channels = [n for i, n in enumerate(weight.shape) if i not in weight_summed]
    out_dtype = str(eqn.outvars[0].aval.dtype)

    def emit(x: jax.Array, *parts: jax.Array) -> jax.Array:
        width = math.prod(x.shape[i] for i in summed)
        rows = jnp.transpose(x, (*kept, *summed)).reshape(*(x.shape[i] for i in kept), width)
        y = quantized_dot(rows, *parts, out_dtype=out_dtype, **scheme.attributes())
        y = y.reshape(*y.shape[:-1], *channels)
        return y if side == 1 else jnp.moveaxis(y, range(len(kept)), range(-len(kept), 0))

    return emit


def _lookup(eqn: ir.JaxprEqn, scheme: Scheme) -> Any:
    """Emits the look-up of quantized rows; only these are dequantized."""

    def emit(index: jax.Array, *parts: jax.Array) -> jax.Array:
        rows = (jnp.take(part, index[..., 0], axis=0, mode="clip") for part in parts)
        return scheme.dequantize(*rows).astype(eqn.outvars[0].aval.dtype)

    return emit
