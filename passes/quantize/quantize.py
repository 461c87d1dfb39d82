"""Replace weights by quantized ones wherever they are multiplied with activations."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph, Input, Recipe, Record
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.passes.quantize.rtn import RoundToNearest
from xlathe.passes.quantize.uses import Layout, Uses, plan_weights
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass
from xlathe.rewrite import Replacement, rewrite

SCHEMES = ("int8",)
GRANULARITIES = ("channel",)
SHOWN = 5  # near misses, or names, in a message


@final
@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Weight-only quantization: input `w` becomes `w.codes` and `w.scale`, made by a recipe from `w`.

    scheme: `int8`, symmetric. granularity: `channel`, one scale an output channel. weights: a regular expression
    that the names of the weights must match in full.

    A weight is quantized where every use of it is a product with activations over the same axes, or a look-up of
    whole rows (a tied embedding). A product that rounds its weight to bfloat16 or float16 first takes the quantized
    one instead; any other loss of precision on the way is kept, and the weight with it.

    Raises OptionError for an unknown scheme or granularity, and where no weight can be quantized.
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
            nearly = _nearly(misses) or _listed(graph.names("weight"))
            raise OptionError(
                f"quantize: weights={self.weights!r} matches no weight that is multiplied with activations; {nearly}"
            )
        result = _replace(graph, plans)
        return result, Record("quantize", hits={"weight": len(plans)}, misses=misses)


def _nearly(misses: Sequence[str]) -> str:
    more = [f"and {len(misses) - SHOWN} more"] if len(misses) > SHOWN else []
    return "nearly: " + "; ".join([*misses[:SHOWN], *more]) if misses else ""


def _listed(names: Sequence[str]) -> str:
    return "the graph has " + ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])


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
    finder = Uses(graph.replace(jaxpr=extended, inputs=tuple(inputs)))
    replacements = {}
    for name in names:
        codes, scale = finder.vars[f"{name}.codes"], finder.vars[f"{name}.scale"]
        for use in finder.of(name)[1]:
            emit = _product(use.eqn, use.side) if use.is_product else _lookup(use.eqn)
            other = use.eqn.invars[1 - use.side]
            replacements[use.eqn.outvars[0]] = Replacement((other, codes, scale), emit)
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
