"""How far a model's predictions move where one of its weights is rounded, for every scheme that it could have.

The KL divergence is measured with one scheme; other schemes of the same weight are taken to move predictions in
proportion to the squared error of its products: both are quadratic forms of what rounding changed, to second order.

Methods that read x^T x run in the model's order, once; here `Search` stands in for them, which needs no more than the
mean squares of activations.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import PassError
from xlathe.graph import Graph
from xlathe.passes.quantize.calibrated import Search
from xlathe.passes.quantize.experts import find_experts
from xlathe.passes.quantize.method import Method, WeightMethod
from xlathe.passes.quantize.recipe import Encode, check_calibrated, check_finite
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Layout, plan_weights
from xlathe.pipeline import Context
from xlathe.stats import InputStats

TOKENS = 2048  # or more, whose predictions are compared: whole batches, from the first
FAR = 20.0  # a logit's difference beyond which sums of exponentials would lose or overflow


@dataclasses.dataclass(frozen=True)
class Unit:
    """What gets one scheme: a weight, or all experts that are multiplied at once. shape: [n, k] of each matrix."""

    names: tuple[str, ...]
    layout: Layout
    shape: tuple[int, int]


def find_units(graph: Graph) -> list[Unit]:
    """Returns what can be quantized, each once, in the graph's order."""
    names = graph.names("weight")
    layouts, _ = plan_weights(graph, list(names))
    experts, _ = find_experts(graph, dict.fromkeys(names))
    groups = [((name,), layout) for name, layout in layouts.items()] + [(e.names, e.layout) for e in experts]
    units = [Unit(members, layout, layout.shape(graph.aval(members[0]))) for members, layout in groups]
    return sorted(units, key=lambda unit: names.index(unit.names[0]))


def measure(
    graph: Graph,
    units: Sequence[Unit],
    options: Sequence[Sequence[Scheme | None]],
    bits: float,
    method: Method,
    context: Context,
) -> list[np.ndarray]:
    """Returns what each option of each unit costs by itself: a KL divergence in nats a token, float64 [options].

    options: schemes that fit the unit; None, as it is, costs nothing. bits: of a weight; of a unit's schemes the one
    nearest to it that changes the weight is measured. Raises OptionError without calibration, PassError where weights,
    activations or predictions are not finite.
    """
    from xlathe.passes.observe import check_calibration, observe  # it reads products as this package does

    batches = _first(check_calibration(graph, context.calibration))
    arrays = {name: np.asarray(graph.arrays[name]) for unit in units for name in unit.names}
    for unit in units:  # else each of them would be blamed for predictions that are not finite
        for name in unit.names:
            check_finite(name, unit.layout.matrix(arrays[name]))
    stats = observe(graph, context.calibration, progress=context.progress).inputs
    for unit in units:
        for name in unit.names:
            check_calibrated(name, stats[name], by="budget")
    alone = method if isinstance(method, WeightMethod) and method.statistics != "gram" else Search()
    divergence, found = Divergence(graph, batches), []
    for number, (unit, schemes) in enumerate(zip(units, options, strict=True)):
        context.progress("measure sensitivity", number / len(units))
        costs, nats = np.zeros(len(schemes)), None  # a unit of cost
        for i in _nearest_first(unit, schemes, bits):
            scheme = schemes[i]
            assert scheme is not None
            encoders = {name: Encode(name, unit.layout, scheme, alone, stats[name]) for name in unit.names}
            rounded = {name: _rounded(arrays[name], encode) for name, encode in encoders.items()}
            costs[i] = sum(_products_error(unit, each, arrays[n], stats[n]) for n, each in rounded.items())
            if costs[i] and nats is None:
                nats = divergence(rounded) / costs[i]
                if not math.isfinite(nats):
                    raise PassError(f"budget: {unit.names[0]} as {scheme}: the predictions are not all finite")
        found.append(costs if nats is None else costs * nats)
    return found


def _first(batches: Sequence[Mapping[str, np.ndarray]]) -> Sequence[Mapping[str, np.ndarray]]:
    """Returns as many batches as hold TOKENS, or all."""
    before = np.cumsum([0, *(batch["tokens"].size for batch in batches)])
    return batches[: int(np.searchsorted(before, TOKENS))]


def _nearest_first(unit: Unit, schemes: Sequence[Scheme | None], bits: float) -> list[int]:
    """Returns the schemes in the order of how far their sizes are from so many bits a weight."""
    far = {i: abs(s.stored.bits(*unit.shape) - bits) for i, s in enumerate(schemes) if s is not None}
    return sorted(far, key=lambda i: far[i])


def _rounded(weight: np.ndarray, make: Encode) -> np.ndarray:
    """Returns what a rounded weight stands for, in its own shape and dtype."""
    return dataclasses.replace(make, made=make.make(weight)).value(weight.shape, weight.dtype)


def _products_error(unit: Unit, rounded: np.ndarray, weight: np.ndarray, stats: InputStats) -> float:
    """Returns the squared error of the products with all tokens seen, as if columns of x were independent."""
    difference = unit.layout.matrix(rounded).astype(np.float64) - unit.layout.matrix(weight)
    return float(np.square(difference).sum(0) @ stats.sum_squares)


class Divergence:
    """KL divergence, nats a token, from a graph to the same graph with some of its weights replaced.

    One compiled program takes the weights as arguments. The graph's own logits of all batches are held, float32.
    """

    def __init__(self, graph: Graph, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.arrays, self.batches = graph.arrays, batches
        self.base = [np.asarray(graph(**batch)) for batch in batches]

        @jax.jit
        def total(arrays: Mapping[str, Any], batch: Mapping[str, Any], base: jax.Array) -> jax.Array:
            return divergences(base, graph.logits(arrays, batch)).sum()

        self._total = total

    def __call__(self, replaced: Mapping[str, np.ndarray]) -> float:
        """replaced: weights by name, in the graph's shapes and dtypes."""
        arrays = {**self.arrays, **{name: jnp.asarray(array) for name, array in replaced.items()}}
        pairs = zip(self.batches, self.base, strict=True)
        total = math.fsum(float(self._total(arrays, batch, base)) for batch, base in pairs)
        return total / sum(batch["tokens"].size for batch in self.batches)


def divergences(base: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns KL(base || logits) [...] of logits [..., vocab], in float32.

    log sum p exp(d - m), where d is what the logits differ by and m its mean: no large numbers are subtracted. Where d
    is large, which exp would not survive, sum p (log p - log q).
    """
    base, logits = base.astype(jnp.float32), logits.astype(jnp.float32)
    p = jax.nn.softmax(base)
    apart = logits - base
    centered = apart - jnp.sum(p * apart, -1, keepdims=True)
    near = jnp.log1p(jnp.sum(p * jnp.expm1(jnp.minimum(centered, FAR)), -1))
    far = jnp.sum(p * (jax.nn.log_softmax(base) - jax.nn.log_softmax(logits)), -1)
    return jnp.where(centered.max(-1) < FAR, near, far)
