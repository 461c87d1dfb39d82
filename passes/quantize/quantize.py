"""Replace weights by quantized ones wherever they are multiplied with activations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph, Recipe, Record
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.passes.quantize.calibrate import make_recipes, told
from xlathe.passes.quantize.experts import Experts, emit_product
from xlathe.passes.quantize.methods import find_method
from xlathe.passes.quantize.plan import Plan, Rule, make_plan
from xlathe.passes.quantize.recipe import EachExpert, Encode
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Uses
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass
from xlathe.rewrite import Replacement, rewrite_graph
from xlathe.storage import take_lines

GRANULARITIES = ("tensor", "channel", "group")
GROUP = 32


@final
@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Replaces input `w` by `w.codes`, `w.scale` and what else its format stores, made by a recipe from `w`.

    scheme: text, `int8`, `int4:g32,asym`, `fp8_e4m3:channel,a=fp8_token`, `nvfp4`: a storage format
    (`xlathe.storage.text` has all of them) and how activations are rounded (`xlathe.ops.activations`). For one without
    options they can be given apart: granularity, what shares a scale (`tensor`, `channel` or `group`); group, the
    successive weights of a channel that do; symmetric, false adds a zero point; activations, `int8` and so on, which
    are other schemes, with results of their own. weights: a regular expression that names of the weights must match in
    full.

    rules: pairs of such an expression and a scheme, or `none`, before that one: the first that matches a name decides.
    With rules and no scheme, weights that no rule matches stay as they are; with neither, the scheme is `int8`.
    method: how codes are chosen, `rtn` (round to nearest) or another of `xlathe.passes.quantize.methods`.

    The experts of a mixture (`jax.lax.ragged_dot` with a stack of them) are quantized each by itself, and lie in one
    array with the others: `w.codes` [experts, ...], where `w` has a star for the expert's number.

    A weight is quantized where every use of it is a product with activations over the same axes, or a look-up of
    whole rows (a tied embedding). A product that rounds its weight to bfloat16 or float16 first takes the quantized
    one instead; any other loss of precision on the way is kept, and the weight with it.

    Raises OptionError for options that are unknown or do not go together, for a rule that decides nothing, and for a
    weight that its format does not fit; PassError, when a weight is prepared, where it holds NaN or infinities.
    """

    keeps: ClassVar[Keeps] = APPROXIMATE

    scheme: str | None = None
    granularity: str | None = None
    weights: str = ".*"
    group: int | None = None
    symmetric: bool = True
    activations: str | None = None
    rules: tuple[tuple[str, str], ...] = ()
    method: str = "rtn"

    def __post_init__(self) -> None:
        self.parsed_rules()
        find_method(self.method)

    def parsed_rules(self) -> tuple[Rule, ...]:
        """Returns all rules in order; the scheme's is the last."""
        rules = [Rule.parse(*_pair(each)) for each in self.rules]
        if self.scheme is not None or not rules:
            rules.append(Rule.parse(self.weights, _scheme_text(self)))
        elif (given := _given(self)) or self.weights != ".*":
            raise OptionError(f"quantize: {', '.join(given or ['weights'])} without a scheme that it belongs to")
        return tuple(rules)

    def plan(self, graph: Graph) -> Plan:
        """Returns what `apply` will do: the scheme and the bytes of every weight. Nothing is computed."""
        return make_plan(graph, self.parsed_rules(), find_method(self.method))

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        plan = self.plan(graph)
        makers = make_recipes(plan, graph, context)
        experts = sum(len(group.names) for group in plan.experts)
        hits = {"weight": len(plan.schemes) - experts} | ({"expert": experts} if experts else {})
        notes = told(plan, graph, makers)
        return _replace(graph, plan, makers), Record("quantize", hits=hits, misses=plan.misses, notes=notes)


def _pair(rule: Any) -> tuple[str, str]:
    if isinstance(rule, tuple) and len(rule) == 2 and all(isinstance(part, str) for part in rule):
        return rule
    raise OptionError(f"quantize: rules: expected pairs (regular expression, scheme) of strings, found {rule!r}")


def _given(options: Quantize) -> list[str]:
    """Returns the options of a scheme that are given apart from its text."""
    names = ("granularity", "group", "symmetric", "activations")
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return [name for name in names if getattr(options, name) is not defaults[name]]


def _scheme_text(options: Quantize) -> str:
    """Returns the text of the scheme with the options that are given apart from it."""
    text, given = options.scheme or "int8", _given(options)
    if not given:
        return text
    if ":" in text or text == "none":
        raise OptionError(f"quantize: scheme={text!r} has all its options in it; found {', '.join(given)} beside it")
    if options.granularity not in (None, *GRANULARITIES):
        hint = did_you_mean(str(options.granularity), GRANULARITIES)
        raise OptionError(f"quantize: granularity={options.granularity!r} is not known{hint}")
    if options.group is not None and (type(options.group) is not int or options.group < 1):
        raise OptionError(f"quantize: group={options.group!r}: expected a positive number")
    shared = [options.granularity] if options.granularity in ("tensor", "channel") else []
    if options.group is not None or options.granularity == "group":
        shared.append(f"g{options.group or GROUP}")
    rounded = [f"a={options.activations}"] if options.activations else []
    return f"{text}:{','.join([*map(str, shared), *['asym'] * (not options.symmetric), *rounded])}"


def _replace(graph: Graph, plan: Plan, makers: Mapping[str, Encode]) -> Graph:
    """Adds the parts of weights as inputs, replaces the products, and drops the weights."""
    finder, replacements, recipes = Uses(graph), {}, []
    added: dict[str, jax.ShapeDtypeStruct] = {}
    in_groups = {name for group in plan.experts for name in group.names}
    for name, make in makers.items():
        if name in in_groups:
            continue
        parts = make.scheme.parts(*make.layout.shape(graph.aval(name)))
        made = {f"{name}.{part}": jax.ShapeDtypeStruct(p.shape, p.dtype) for part, p in parts.items()}
        for use in finder.of(name)[1]:
            emit = _product(use.eqn, use.side, make.scheme) if use.is_product else _lookup(use.eqn, make.scheme)
            other = use.eqn.invars[1 - use.side]
            replacements[use.eqn.outvars[0]] = Replacement((other,), emit, added=tuple(made))
        added |= made
        recipes.append(Recipe(name, tuple(made), make))
    for group in plan.experts:
        scheme = makers[group.names[0]].scheme
        made = _stacked(graph, group, scheme)
        emit = emit_product(group.eqn, scheme.attributes())
        replacements[group.eqn.outvars[0]] = Replacement((group.rows, group.sizes), emit, added=tuple(made))
        added |= made
        each = EachExpert(tuple(makers[name] for name in group.names))
        recipes.append(Recipe(group.names[0], tuple(made), each, group.names[1:]))
    return rewrite_graph(graph, replacements, added).replace(weights=graph.weights.derive(*recipes))


def _stacked(graph: Graph, group: Experts, scheme: Scheme) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the inputs that replace the matrices of experts."""
    parts = scheme.parts(*group.layout.shape(graph.aval(group.names[0])))
    count = len(group.names)
    return {f"{group.stem}.{part}": jax.ShapeDtypeStruct((count, *p.shape), p.dtype) for part, p in parts.items()}


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
        rows = scheme.stored.decode(*take_lines(scheme.stored, index[..., 0], *parts))
        return rows.astype(eqn.outvars[0].aval.dtype)

    return emit
