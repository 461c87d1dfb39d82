"""Whole layers: how much each changes the residual stream, and the graph without some of them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.pipeline import Context
from xlathe.rewrite import Replacement, rewrite_graph
from xlathe.sections import layers


def block_influence(graph: Graph, context: Context) -> tuple[float, ...]:
    """Returns 1 - cosine between each layer's input and output, averaged over calibration tokens.

    Men et al. 2024, https://arxiv.org/abs/2403.03853. Raises PassError where no layers are found, OptionError
    without calibration tokens.
    """
    blocks = layers(graph)
    if not blocks:
        raise PassError("found no repeated layers between cuts of the residual stream")
    if not len(context.calibration):
        raise OptionError(
            "removing layers needs calibration tokens: pipeline(graph, calibration=batches) or --calibration=FILE"
        )
    exposed = ir.expose(graph.jaxpr, [var for block in blocks for var in block])

    @jax.jit
    def run(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        _, *values = graph.evaluate(exposed, arrays, batch)
        return [_distance(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]

    batches = [graph.check_batch(batch) for batch in context.calibration]
    sums = [np.asarray(run(graph.arrays, batch)) for batch in batches]
    count = sum(batch["tokens"].size for batch in batches)
    return tuple((np.sum(sums, axis=0) / count).tolist())


def _distance(before: jax.Array, after: jax.Array) -> jax.Array:
    a, b = (x.astype(jnp.float32) for x in (before, after))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (1 - (a * b).sum(-1) / jnp.maximum(norms, 1e-30)).sum()


def least(influence: tuple[float, ...], count: int) -> tuple[int, ...]:
    """Returns the layers that change the stream least; raises OptionError where none would stay."""
    if count and count >= len(influence):
        raise OptionError(f"layers={count} of {len(influence)} layers cannot go: at least one must stay")
    return tuple(sorted(int(i) for i in np.argsort(influence, kind="stable")[:count]))


def without_layers(graph: Graph, removed: tuple[int, ...]) -> Graph:
    """Returns the graph in which the removed layers, by number, pass on their input."""
    if not removed:
        return graph
    blocks = layers(graph)
    if max(removed) >= len(blocks):
        raise OptionError(f"the plan removes layer {max(removed)}, this graph has {len(blocks)} layers")
    replacements = {blocks[i][1]: Replacement((blocks[i][0],), lambda x: x) for i in removed}
    return rewrite_graph(graph, replacements)
