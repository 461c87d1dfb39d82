"""Replace weights by quantized ones wherever they are multiplied with activations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph, Recipe, Record
from xlathe.passes.quantize.calibrate import make_recipes
from xlathe.passes.quantize.methods import find_method
from xlathe.passes.quantize.plan import Plan, Rule, make_plan
from xlathe.passes.quantize.products import Replaced, replace_products
from xlathe.passes.quantize.recipe import EachExpert, Encode
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass

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
        context.planned(plan, graph)
        encoders, notes = make_recipes(plan, graph, context)
        experts = sum(len(group.names) for group in plan.experts)
        hits = {"weight": len(plan.schemes) - experts} | ({"expert": experts} if experts else {})
        record = Record("quantize", hits=hits, misses=plan.misses, notes=(*plan.remarks, *notes))
        return _replace(graph, plan, encoders), record


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


def _replace(graph: Graph, plan: Plan, encoders: Mapping[str, Encode]) -> Graph:
    """Adds the parts of weights as inputs, replaces the products, and drops the weights."""
    chosen = {name: (encode.scheme, encode.layout) for name, encode in encoders.items()}
    result, replaced = replace_products(graph, chosen, plan.experts)
    recipes = [Recipe(each.weights[0], each.parts, _make(each, encoders), each.weights[1:]) for each in replaced]
    return result.replace(weights=graph.weights.derive(*recipes))


def _make(replaced: Replaced, encoders: Mapping[str, Encode]) -> Callable[[Any], tuple[Any, ...]]:
    own = tuple(encoders[name] for name in replaced.weights)
    return EachExpert(own) if replaced.stacked else own[0]
