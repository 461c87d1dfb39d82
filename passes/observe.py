"""Calibrate: run a graph on sample tokens and keep statistics of what each weight is multiplied with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.quantize.experts import Experts, find_experts
from xlathe.passes.quantize.uses import Layout, Uses, plan_weights
from xlathe.stats import InputStats, Stats

Found = Mapping[str, Sequence[Mapping[str, jax.Array]]]
"""Statistics of one batch, one a use of the weight."""
TOKENS = 256  # whose products are one sum


def observe(
    graph: Graph,
    batches: Sequence[Any],
    gram: bool = False,
    progress: Callable[[str, float], None] = lambda description, fraction: None,
) -> Stats:
    """Returns statistics of the input of every product with a weight; `k` is ordered as the weight's summed axes.

    graph: a forward graph. batches: int32 tokens [b, t], every token counts. gram: whether to sum x^T x as well,
    which takes k * k numbers a weight. An expert's statistics are of the tokens that chose it (`unseen` lists those
    that none chose).
    Raises OptionError without batches.
    """
    checked = check_calibration(graph, batches)
    products = find_products(graph, graph.names("weight"))
    exposed = ir.expose(graph.jaxpr, products.values)

    @jax.jit
    def run(arrays: dict[str, jax.Array], batch: dict[str, jax.Array]) -> Found:
        _, *values = graph.evaluate(exposed, arrays, batch)
        return products.statistics(values, gram)

    total: dict[str, InputStats] = {}
    for number, batch in enumerate(checked):
        add_found(total, run(graph.arrays, batch))
        progress("calibrating", (number + 1) / len(batches))
    return Stats(total)


def check_calibration(graph: Graph, batches: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Returns the arguments of each batch; raises OptionError where there are none, or the graph takes none."""
    if graph.is_step:
        raise OptionError("calibration runs a forward graph, this is an incremental step")
    if not isinstance(batches, Sequence | np.ndarray) or not len(batches):
        what = "none" if isinstance(batches, Sequence | np.ndarray) else type(batches).__name__
        raise OptionError(f"calibration needs at least one batch of int32 tokens [b, t], got {what}")
    return [graph.check_batch(batch) for batch in batches]


@dataclasses.dataclass(frozen=True)
class Products:
    """What each weight is multiplied with.

    plain: by the name of a weight, activations and which of their axes are summed over. experts: stacks of weights that
    groups of rows are multiplied with.
    """

    plain: Mapping[str, Sequence[tuple[ir.Var, tuple[int, ...]]]]
    experts: Sequence[Experts] = ()

    @property
    def values(self) -> list[ir.Var]:
        """The activations that `statistics` reads, in order."""
        routed = (var for group in self.experts for var in (group.rows, group.sizes))
        return list(dict.fromkeys((*(var for inputs in self.plain.values() for var, _ in inputs), *routed)))

    def statistics(self, values: Sequence[jax.Array], gram: bool) -> Found:
        """Returns sums over the tokens of one batch; values: of `self.values`."""
        seen = dict(zip(self.values, values, strict=True))
        found: dict[str, Sequence[Any]] = {
            name: [_statistics(_rows(seen[var], axes), gram) for var, axes in inputs]
            for name, inputs in self.plain.items()
        }
        for group in self.experts:
            found |= _of_experts(group, seen[group.rows].astype(jnp.float32), seen[group.sizes], gram)
        return found


def find_products(graph: Graph, names: Sequence[str]) -> Products:
    """Returns the products with weights among `names` that could be quantized."""
    layouts, _ = plan_weights(graph, list(names))
    experts, _ = find_experts(graph, dict.fromkeys(names))
    uses = Uses(graph)
    return Products({name: _inputs(uses, name, layout) for name, layout in layouts.items()}, experts)


def add_found(total: dict[str, InputStats], found: Found) -> None:
    """Adds the statistics of one more batch; sums of x^T x, the only large ones, grow in place."""
    for name, parts in jax.device_get(found).items():
        for part in parts:
            total[name] = _added(total[name], part) if name in total else _to_stats(part)


def _added(total: InputStats, part: dict[str, np.ndarray]) -> InputStats:
    gram, small = total.gram, {key: value for key, value in part.items() if key != "gram"}
    with np.errstate(invalid="ignore"):  # who reads sums that are not finite says of which weight
        if gram is not None:
            gram += part["gram"]
        return dataclasses.replace(dataclasses.replace(total, gram=None) + _to_stats(small), gram=gram)


def _inputs(uses: Uses, name: str, layout: Layout) -> list[tuple[ir.Var, tuple[int, ...]]]:
    """Returns the activations that a weight is multiplied with, and which of their axes are summed over."""
    found = []
    for use in uses.of(name)[1]:
        if use.is_product:
            other = use.eqn.invars[1 - use.side]
            axes = tuple(sorted(use.eqn.params["dimension_numbers"][0][1 - use.side]))
            assert isinstance(other, ir.Var) and layout.contracted
            found.append((other, axes))
    return found


def unseen(stats: Stats) -> tuple[str, ...]:
    """Returns the weights that no token of the calibration was multiplied with: experts that none chose."""
    return tuple(name for name, found in stats.inputs.items() if not found.count)


def _rows(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns an activation as float32 [tokens, k]."""
    kept = [i for i in range(x.ndim) if i not in axes]
    size = int(np.prod([x.shape[i] for i in axes]))
    return x.transpose(*kept, *axes).reshape(-1, size).astype(jnp.float32)


def _of_experts(group: Experts, rows: jax.Array, sizes: jax.Array, gram: bool) -> Found:
    """Returns statistics of the rows of each expert: zeros in place of the rows of others add nothing to a sum."""
    ends, places, found = jnp.cumsum(sizes), jnp.arange(rows.shape[0]), {}
    for i, name in enumerate(group.names):
        own = (places < ends[i]) & (places >= ends[i] - sizes[i])
        found[name] = [_statistics(jnp.where(own[:, None], rows, 0.0), gram) | {"count": sizes[i]}]
    return found


def _statistics(x: jax.Array, gram: bool) -> dict[str, jax.Array]:
    return {
        "count": jnp.asarray(x.shape[0]),
        "absmax": jnp.abs(x).max(axis=0),
        "sum_squares": jnp.square(x).sum(axis=0),
        "sum_absolute": jnp.abs(x).sum(axis=0),
    } | ({"gram": _gram(x)} if gram else {})


def _gram(x: jax.Array) -> jax.Array:
    """Returns x^T x, of a few tokens at a time: XLA splits longer sums by the number of threads, which changes bits."""
    steps = -(-x.shape[0] // TOKENS)
    padded = jnp.pad(x, ((0, steps * TOKENS - x.shape[0]), (0, 0))).reshape(steps, TOKENS, x.shape[1])

    def add(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
        return total + part.T @ part, None

    return jax.lax.scan(add, jnp.zeros((x.shape[1],) * 2, x.dtype), padded)[0]


def _to_stats(found: dict[str, np.ndarray]) -> InputStats:
    wide = {key: np.array(value, np.float64) for key, value in found.items() if key not in ("count", "absmax")}
    return InputStats(count=np.asarray(found["count"], np.int64), absmax=found["absmax"], **wide)
