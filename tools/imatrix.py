"""An importance matrix, as llama.cpp's tool `imatrix` makes one: the mean square of each input of each matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xlathe.models.export import source_names
from xlathe.passes.observe import observe

if TYPE_CHECKING:
    from xlathe.graph import Graph
    from xlathe.models.formats.gguf import Plan


def importance_of(graph: "Graph", plan: "Plan", batches: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns float32 [matrices, columns] by names of a plan's tensors, for those that are multiplied with activations.

    graph: which the plan was made of. batches: int32 tokens [b, t]. The output layer is among them, also where it is
    the embedding; llama.cpp's tool leaves it out unless it is told to process it. An expert that no token chose weighs
    its columns alike. Raises OptionError without batches.
    """
    ours, seen, found = source_names(graph), observe(graph, batches).inputs, {}
    for tensor in plan.tensors:
        names = [ours.get(source, "") for source in tensor.plan.sources]
        if names and all(name in seen for name in names):
            found[tensor.plan.name] = np.stack([_mean(seen[name].sum_squares, int(seen[name].count)) for name in names])
    return found


def _mean(squares: np.ndarray, count: int) -> np.ndarray:
    return (squares / count if count else np.ones_like(squares)).astype(np.float32)
