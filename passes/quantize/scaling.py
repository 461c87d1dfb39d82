"""Move factors of channels from activations into weights: AWQ's scales and SmoothQuant, before a model is quantized."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Record
from xlathe.passes.quantize.algorithms.awq import awq_scales
from xlathe.passes.quantize.algorithms.smooth import smooth_scales
from xlathe.passes.quantize.enough import few_for_averages
from xlathe.passes.quantize.pairs import Pair, find_pairs
from xlathe.passes.quantize.recipe import check_calibrated, check_finite
from xlathe.passes.quantize.uses import Uses
from xlathe.pipeline import REASSOCIATED, Context, Keeps, Pass, is_forward
from xlathe.stats import InputStats
from xlathe.storage import Scaled, parse_format

Choose = Callable[[Pair, Sequence[np.ndarray], InputStats], np.ndarray]
"""Factors [channels] of a pair, whose readers are float32 [n, k] each."""


@final
@dataclasses.dataclass(frozen=True)
class AwqScales(Pass):
    """Scales up the columns of weights that read large activations, so that rounding them costs less.

    scheme: the storage format that scales are searched for, `int4:g128`; what quantizes afterwards should be the same.
    Each pair of makers (a norm, an up-projection, a value projection) and readers of some channels, which are found in
    the graph, gets the factors with the least error of its products (Lin et al. 2023, arXiv 2306.00978). As published,
    values that several heads share stay: one factor for all of them was no better. The model's function stays.

    Needs calibration batches (OptionError). Raises PassError where no pair is found.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    scheme: str = "int4:g128"

    def __post_init__(self) -> None:
        self._stored()

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        stored = self._stored()

        def choose(pair: Pair, weights: Sequence[np.ndarray], stats: InputStats) -> np.ndarray:
            assert stats.gram is not None
            for misfit in (stored.misfit(*weight.shape) for weight in weights):
                if misfit:
                    raise PassError(f"awq_scales: scheme={self.scheme!r}: {misfit}")
            absolute = stats.sum_absolute / max(int(stats.count), 1)
            return awq_scales([jnp.asarray(w) for w in weights], absolute, stats.gram.astype(np.float32), stored)

        return _rescale("awq_scales", graph, context, choose, lambda pair: pair.copies is None, gram=True)

    def _stored(self) -> Scaled:
        stored = parse_format(self.scheme)
        if not isinstance(stored, Scaled):
            raise OptionError(f"awq_scales: scheme={self.scheme!r} has no scales that others could lower the error of")
        return stored


@final
@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divides channels of activations by max|x|^alpha / max|w|^(1 - alpha), so that they are rounded with less error.

    For schemes that round activations (Xiao et al. 2022, arXiv 2211.10438). alpha: how much of the outliers weights
    take over, 0 to 1. norms: only channels that a norm makes, as published; else those of up-projections and values as
    well, where heads that share values share factors. The function of the model stays.

    Needs calibration batches (OptionError). Raises PassError where no pair is found.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    alpha: float = 0.5
    norms: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise OptionError(f"smooth_quant: alpha={self.alpha!r}: expected a number from 0 to 1")

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        def choose(pair: Pair, weights: Sequence[np.ndarray], stats: InputStats) -> np.ndarray:
            absmax = pair.by_channel(stats.absmax[None]).max(axis=0)
            return smooth_scales([pair.by_channel(weight) for weight in weights], absmax, self.alpha)

        return _rescale("smooth_quant", graph, context, choose, lambda pair: pair.by_norm or not self.norms, gram=False)


def _rescale(
    name: str, graph: Graph, context: Context, choose: Choose, takes: Callable[[Pair], bool], *, gram: bool
) -> tuple[Graph, Record]:
    from xlathe.passes.observe import observe  # it reads products as this package does

    stats = observe(graph, context.calibration, gram, context.progress).inputs
    found, misses = find_pairs(graph)
    pairs = [p for p in found if takes(p) and all(side.name in stats for side in p.readers)]
    uses, result = Uses(graph), graph
    for pair in pairs:  # else what they make would be blamed
        _matrices(name, graph, uses, pair)
    for reader in (side.name for pair in pairs for side in pair.readers):
        check_calibrated(reader, stats[reader], by=name)
    if not pairs:
        raise PassError(f"{name}: no channels that weights make and weights read; nearly: {'; '.join(misses[:5])}")
    for number, pair in enumerate(pairs):
        factors = choose(pair, _matrices(name, result, uses, pair), stats[pair.readers[0].name])
        result = result.replace(weights=result.weights.derive(*pair.recipes(factors)))
        context.progress(name, (number + 1) / len(pairs))
    hits = {"norm": sum(pair.by_norm for pair in pairs), "projection": sum(not pair.by_norm for pair in pairs)}
    read = {pair.readers[0].name: stats[pair.readers[0].name] for pair in pairs}
    return result, Record(name, hits=hits, misses=misses, notes=few_for_averages(read))


def _matrices(name: str, graph: Graph, uses: Uses, pair: Pair) -> list[np.ndarray]:
    """Returns the weights that read the channels, as they are by now, float32 [n, k]."""
    found = []
    for side in pair.readers:
        layout = uses.layout(side.name)
        assert layout is not None and layout.contracted == (side.axis,)
        matrix = layout.matrix(graph.weights[side.name])
        check_finite(side.name, matrix, by=name)
        found.append(matrix)
    return found
