"""Quantization-aware training: a graph that computes what the quantized one will, of float weights, differentiably."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.axes import Einsum
from xlathe.errors import OptionError
from xlathe.graph import Graph, Recipe, Record
from xlathe.ops.fake_quantize import fake_quantize, fake_round
from xlathe.passes.quantize.plan import Entry, Plan, Rule
from xlathe.passes.quantize.quantize import Quantize
from xlathe.passes.quantize.recipe import check_finite
from xlathe.passes.quantize.uses import Layout, Uses
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass, is_forward
from xlathe.rewrite import Replacement, rewrite_graph
from xlathe.storage import Scaled
from xlathe.storage.cast import Cast


@final
@dataclasses.dataclass(frozen=True)
class FakeQuantize(Pass):
    """Rounds weights, and activations where a scheme does, as `Quantize` with the same options would; in floats.

    scheme, weights, rules: as `Quantize` has them. The weights stay inputs of the same names, and gradients pass
    straight through the rounding, so that `jax.grad` of a loss on `graph.logits(arrays, batch)` trains them to be
    rounded. Afterwards `graph.with_weights(trained)` of the graph before this pass is what `Quantize` takes.

    A weight of the graph that is not finite is refused by name when it is read (PassError), as `Quantize` refuses it.
    Inside a program, where values have no names (`jax.grad`, `jax.jit`), what is not finite becomes NaN, in weights and
    in activations, and with it the loss and its gradients: rounding hides none.

    Raises OptionError as `Quantize` does, and for static activations and formats that are encoded outside a program.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = APPROXIMATE

    scheme: str | None = None
    weights: str = ".*"
    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for rule in self._quantizer.parsed_rules():
            _check(rule)

    @property
    def _quantizer(self) -> Quantize:
        return Quantize(self.scheme, weights=self.weights, rules=self.rules)

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        plan = self._quantizer.plan(graph)
        rounded = _round_weights(rewrite_graph(graph, _rounded_products(graph, plan)), plan)
        checks = [Recipe(e.name, (e.name,), _Finite(e.name, e.layout)) for e in plan.entries if e.layout is not None]
        rounded = rounded.replace(weights=rounded.weights.derive(*checks))
        return rounded, Record("fake_quantize", hits={"weight": len(plan.schemes)}, misses=plan.misses)


@final
@dataclasses.dataclass(frozen=True)
class _Finite:
    """Recipe of a weight from itself, which raises PassError where it is not finite."""

    name: str
    layout: Layout

    def __call__(self, weight: Any) -> tuple[Any]:
        check_finite(self.name, self.layout.matrix(weight), by="fake_quantize")
        return (weight,)


def _check(rule: Rule) -> None:
    if rule.scheme is None:
        return
    if rule.scheme.is_static:
        raise OptionError(
            f"fake_quantize: {rule.scheme}: the steps of static activations come from calibration, which training "
            "changes; a step a token, as in a=int8_token, is found as it goes"
        )
    if not isinstance(rule.scheme.stored, Scaled | Cast):
        raise OptionError(
            f"fake_quantize: {rule.scheme}: its encoder is no JAX program; formats of levels and scales have one, and "
            "int4:g32,asym is the nearest"
        )


def _rounded_products(graph: Graph, plan: Plan) -> Mapping[ir.Var, Replacement]:
    """Returns what replaces the products whose activations are rounded."""
    finder, found = Uses(graph), {}
    experts = {name: group for group in plan.experts for name in group.names}
    for name, scheme in plan.schemes.items():
        if scheme.activations is None:
            continue
        uses = [] if name in experts else finder.of(name)[1]
        sides = [(use.eqn, 1 - use.side) for use in uses if use.is_product]
        for eqn, side in [(experts[name].eqn, 0)] if name in experts else sides:
            operands = tuple(atom for atom in eqn.invars if isinstance(atom, ir.Var))
            found[eqn.outvars[0]] = Replacement(operands, _product(eqn, side, scheme.activations))
    return found


def _product(eqn: ir.JaxprEqn, side: int, activations: str) -> Any:
    """Emits the same product with operand `side` rounded along the axes that are summed over."""
    axes = range(eqn.invars[side].aval.ndim)
    is_einsum = eqn.primitive.name == "dot_general"  # experts' products sum over the last axis
    summed = tuple(sorted(pair[side] for pair in Einsum.of(eqn).contracted)) if is_einsum else (axes[-1],)
    rows = Layout(tuple(axis for axis in axes if axis not in summed), summed)

    def emit(*operands: jax.Array) -> jax.Array:
        x, values = operands[side], list(operands)
        rounded = fake_round(rows.flat(x), activations=activations)
        values[side] = rows.weight(rounded, x.shape).astype(x.dtype)
        return ir.bind(eqn, values)[0]

    return emit


def _round_weights(graph: Graph, plan: Plan) -> Graph:
    chosen = {e.name: e for e in plan.entries if e.scheme is not None}

    def run(*operands: jax.Array) -> list[Any]:
        values = [
            _rounded(weight, chosen[item.name]) if item.name in chosen else weight
            for item, weight in zip(graph.inputs, operands, strict=True)
        ]
        return ir.evaluate(graph.jaxpr, values)

    return graph.replace(jaxpr=ir.trace(run, *(var.aval for var in graph.jaxpr.invars)))


def _rounded(weight: jax.Array, entry: Entry) -> jax.Array:
    assert entry.layout is not None and entry.scheme is not None
    matrix = entry.layout.flat(weight.astype(jnp.float32))
    rounded = fake_quantize(matrix, format=str(entry.scheme.stored))
    return entry.layout.weight(rounded, weight.shape).astype(weight.dtype)
