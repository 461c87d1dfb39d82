"""Turn the residual stream by a random orthogonal matrix, so that no channel of it is an outlier."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np

from xlathe import jaxpr as ir
from xlathe.coupling import couple, separate
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Input, Recipe, Record
from xlathe.passes.quantize.algorithms.rotation import random_rotation
from xlathe.passes.quantize.pairs import Pair, find_pairs
from xlathe.passes.quantize.recipe import check_finite
from xlathe.passes.quantize.turning import AxisSet, prove
from xlathe.passes.quantize.uses import Uses
from xlathe.pipeline import REASSOCIATED, Context, Keeps, Pass, is_forward
from xlathe.sections import cut_points


@final
@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Multiplies the residual stream by an orthogonal matrix, so that its outliers are spread over all channels.

    Weights of norms are folded into those that read them; then every weight that writes to the stream or reads it is
    multiplied by the matrix along that axis (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456), in float64. The model's
    function stays, which is proved in the graph before anything changes (`turning.py`). Where an embedding is the
    output layer too and the last norm has a weight, the output layer becomes a weight of its own, `NAME.head`.

    seed: of the matrix, a Hadamard matrix with random signs where the width has one.
    Raises PassError where the proof fails, with the operation and its line: a LayerNorm subtracts a mean, say.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"rotate: seed={self.seed!r}: expected a whole number, 0 or more")

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        tied, notes = _tied(graph), tuple[str, ...]()
        try:
            plan = _plan(graph)
        except PassError:
            if not tied:
                raise
            graph = _untie(graph, tied)
            plan = _plan(graph)
            notes = tuple(f"{name} is the output layer no more: {name}.head is" for name in tied)
        recipes = plan.recipes(graph, random_rotation(plan.size, self.seed))
        hits = {"norm": len(plan.folded), "weight": len(plan.turned)}
        result = graph.replace(weights=graph.weights.derive(*recipes))
        return result, Record("rotate", hits=hits, notes=notes)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which norms are folded, and which axes of which weights are turned. size: channels of the stream."""

    folded: tuple[Pair, ...]
    turned: Mapping[str, AxisSet]
    size: int

    def recipes(self, graph: Graph, matrix: np.ndarray) -> list[Recipe]:
        scales: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in self.turned}
        recipes = []
        for pair in self.folded:
            (norm,) = pair.makers
            factors = np.asarray(graph.weights[norm.name]).astype(np.float64) + norm.offset
            check_finite(norm.name, factors, by="rotate")
            for reader in pair.readers:
                scales.setdefault(reader.name, []).append((reader.axis, factors))
            recipes.append(Recipe(norm.name, (norm.name,), _Filled(1.0 - norm.offset)))
        return recipes + [
            Recipe(name, (name,), _Turned(name, tuple(found), tuple(sorted(self.turned.get(name, ()))), matrix))
            for name, found in scales.items()
        ]


@final
@dataclasses.dataclass(frozen=True)
class _Filled:
    """Recipe of an array that holds one number."""

    number: float

    def __call__(self, weight: Any) -> tuple[np.ndarray]:
        return (np.full_like(np.asarray(weight), self.number),)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class _Turned:
    """Recipe of a weight times factors [size] along axes, then times the matrix [size, size] along axes, in float64."""

    name: str
    scales: tuple[tuple[int, np.ndarray], ...]
    axes: tuple[int, ...]
    matrix: np.ndarray

    def __call__(self, weight: Any) -> tuple[np.ndarray]:
        array = np.asarray(weight)
        check_finite(self.name, array, by="rotate")
        result = array.astype(np.float64)
        for axis, factors in self.scales:
            result = result * factors.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        for axis in self.axes:
            result = np.moveaxis(np.moveaxis(result, axis, -1) @ self.matrix, -1, axis)
        return (result.astype(array.dtype),)


@final
@dataclasses.dataclass(frozen=True)
class _Twice:
    """Recipe of two weights that are what one was."""

    def __call__(self, weight: Any) -> tuple[Any, Any]:
        return weight, weight


def _plan(graph: Graph) -> _Plan:
    """Finds what to fold and to turn, and proves that the results stay; raises PassError where they do not."""
    graph = separate(graph)
    axes, size = _stream_axes(graph)
    pairs, _ = find_pairs(graph)
    folded = tuple(p for p in pairs if p.by_norm and len(p.makers) == 1 and p.makers[0].name in axes)
    flat = frozenset(p.makers[0].name for p in folded)
    turned = {name: found for name, found in axes.items() if name not in flat}
    try:
        prove(graph, turned, flat)
    except PassError as error:
        raise PassError(f"rotate: {error}") from None
    return _Plan(folded, turned, size)


def _stream_axes(graph: Graph) -> tuple[dict[str, AxisSet], int]:
    """Returns the axes of weights that are channels of the residual stream, and how many channels that are.

    The stream is the dimension that most of the cut points share; whether it can be turned is left to the proof.
    """
    coupling = couple(graph)
    dims = coupling.dimensions
    labels = (coupling.values[cut].labels for cut in cut_points(graph))
    found = Counter(dims.resolve(label) for own in labels for label in own if not ir.is_symbolic(dims.size(label)))
    del found[()]
    if not found:
        raise PassError("rotate: no residual stream: no value [b, t, width] carries all that depends on the tokens")
    ((stream, _),) = found.most_common(1)
    axes = {}
    for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
        own = frozenset(i for i, label in enumerate(coupling.values[var].labels) if dims.resolve(label) == stream)
        if own and item.kind == "weight":
            axes[item.name] = own
    return axes, int(dims.size(stream))


def _tied(graph: Graph) -> dict[str, list[ir.JaxprEqn]]:
    """Returns the products with each weight whose rows are looked up as well."""
    uses, tied = Uses(graph), {}
    for name in graph.names("weight"):
        try:
            found = uses.of(name)[1]
        except ValueError:
            continue
        products = [use.eqn for use in found if use.is_product]
        if products and any(use.is_lookup for use in found):
            tied[name] = products
    return tied


def _untie(graph: Graph, tied: Mapping[str, Sequence[ir.JaxprEqn]]) -> Graph:
    """Gives the products with a weight that is looked up as well a weight of their own, `NAME.head`."""
    producer = ir.producers(graph.jaxpr.eqns)
    owner = dict(zip(graph.jaxpr.invars, (item.name for item in graph.inputs), strict=True))
    products = {id(eqn) for found in tied.values() for eqn in found}
    avals = [var.aval for var in graph.jaxpr.invars]

    def run(*operands: Any) -> list[Any]:
        heads = dict(zip(tied, operands[len(avals) :], strict=True))

        def through(atom: ir.Atom, value: Any) -> Any:
            """The same view of the head, where a value is a view of a tied weight."""
            eqns: list[ir.JaxprEqn] = []
            while isinstance(atom, ir.Var) and atom not in owner and len(producer[atom].invars) == 1:
                eqns.append(producer[atom])
                atom = eqns[-1].invars[0]
            if not isinstance(atom, ir.Var) or owner.get(atom) not in heads:
                return value
            head = heads[owner[atom]]
            for eqn in reversed(eqns):
                (head,) = ir.bind(eqn, [head])
            return head

        def rule(eqn: ir.JaxprEqn, values: list[Any]) -> list[Any] | None:
            if id(eqn) not in products:
                return None
            return ir.bind(eqn, [through(a, value) for a, value in zip(eqn.invars, values, strict=True)])

        return ir.evaluate(graph.jaxpr, operands[: len(avals)], rule)

    jaxpr = ir.trace(run, *avals, *(graph.aval(name) for name in tied))
    added = tuple(Input(f"{name}.head", "weight") for name in tied)
    recipes = [Recipe(name, (name, f"{name}.head"), _Twice()) for name in tied]
    return graph.replace(jaxpr=jaxpr, inputs=(*graph.inputs, *added), weights=graph.weights.derive(*recipes))
