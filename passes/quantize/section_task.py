"""What a method is given that quantizes all weights of a section at once: the section as a function of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.passes.quantize.recipe import Encode
from xlathe.passes.quantize.walk import Walk
from xlathe.stats import InputStats


@dataclasses.dataclass(frozen=True)
class SectionTask:
    """Weights between two cut points, what they are given and what they should make of it.

    makers: of each weight, by name; matrices: the weights, float32 [n, k]; stats: of their inputs. count: calibration
    rows. data: arrays that `error` takes. seed: of what is drawn.
    """

    makers: Mapping[str, Encode]
    matrices: Mapping[str, np.ndarray]
    stats: Mapping[str, InputStats]
    count: int
    data: Any
    function: Callable[..., Any]
    avals: Mapping[str, Any]
    walk: Walk
    seed: int

    @staticmethod
    def of(
        output: ir.Var,
        makers: Mapping[str, Encode],
        stats: Mapping[str, InputStats],
        walk: Walk,
        floats: Walk,
        seed: int,
    ) -> "SectionTask":
        """Reads the weights of `makers`, and runs the section as it was trained.

        walk: at the section's start, behind quantized weights; floats: there too, behind those that were trained.
        Raises OptionError for rows of different lengths.
        """
        lengths = {row["tokens"].shape[1] for row in walk.rows}
        if len(lengths) > 1:
            raise OptionError(
                f"what a section puts out is compared for calibration rows of one length, found {sorted(lengths)}"
            )
        given, names = walk.graph.names("arg"), walk.needed([output])
        others = [name for name in names if name not in makers and name not in given]
        arguments = [name for name in names if name in given]
        data = {
            "others": [walk.current[name] for name in others],
            "arguments": [np.stack([row[name] for row in walk.rows]) for name in arguments],
            "values": [jnp.stack(walk.values)] if walk.values else [],
            "targets": jnp.stack(floats.outputs(output)),
        }
        return SectionTask(
            makers,
            {name: make.matrix(walk.current[name]) for name, make in makers.items()},
            stats,
            len(walk.rows),
            data,
            walk.function([output], [*makers, *others, *arguments], lengths.pop()),
            {name: walk.graph.aval(name) for name in makers},
            walk,
            seed,
        )

    def error(self, matrices: Sequence[jax.Array], data: Any, rows: jax.Array) -> jax.Array:
        """Returns the mean square of what the section puts out with other weights less what it did as trained.

        matrices: float32 [n, k] each, in order; rows: int32, of which calibration rows. Activations of one row are
        held at a time, also on the way back.
        """
        made = [
            make.layout.weight(matrix, aval.shape).astype(aval.dtype)
            for make, matrix, aval in zip(self.makers.values(), matrices, self.avals.values(), strict=True)
        ]

        def add(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            arguments, values = ([array[row] for array in data[key]] for key in ("arguments", "values"))
            (found,) = self.function([*made, *data["others"], *arguments], values)
            difference = found.astype(jnp.float32) - data["targets"][row].astype(jnp.float32)
            return total + jnp.square(difference).sum(), None

        total, _ = jax.lax.scan(jax.checkpoint(add), jnp.zeros((), jnp.float32), rows)
        return total / (rows.size * data["targets"][0].size)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function of arrays, which is compiled once for sections that are alike."""
        compiled = self.walk.compiled(("section", self.walk.at), function, *arguments)
        return jax.block_until_ready(compiled(*arguments))
