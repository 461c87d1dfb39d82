"""The optimizer of a graph's weights: Muon for matrices that tokens are multiplied with, AdamW for all else."""

from typing import Any

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from xlathe.graph import Graph
from xlathe.passes.quantize.uses import Uses, plan_weights

WARM_UP = 0.05  # of all steps


def make_optimizer(graph: Graph, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns Muon with AdamW, https://arxiv.org/abs/2502.16982: the rate warms up, then falls to zero in a line.

    Which axes of a weight are summed over is read from the products. Embeddings and the output layer are AdamW's.
    """
    dimensions = _matrices(graph)

    def rate(step: Any) -> Any:  # an optax.Schedule
        warm = max(1.0, WARM_UP * steps)
        return learning_rate * jnp.clip(jnp.minimum((step + 1) / warm, (steps - step) / max(1.0, steps - warm)), 0, 1)

    update = muon(
        rate,
        ns_steps=4,
        preconditioning="aol",
        weight_decay=0.05,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda weights: {name: dimensions.get(name) for name in weights},
    )
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def _matrices(graph: Graph) -> dict[str, MuonDimensionNumbers]:
    layouts, _ = plan_weights(graph, list(graph.names("weight")))
    finder = Uses(graph)
    return {
        name: MuonDimensionNumbers(reduction_axis=layout.contracted, output_axis=layout.free)
        for name, layout in layouts.items()
        if layout.shape(graph.aval(name))[0] != graph.vocab and all(use.is_product for use in finder.of(name)[1])
    }
