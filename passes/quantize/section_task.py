"""What a method is given that quantizes all weights of a section at once: the section as a function of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.passes.quantize.method import Initial
from xlathe.passes.quantize.recipe import Encode
from xlathe.passes.quantize.walk import Walk


@dataclasses.dataclass(frozen=True)
class SectionTask:
    """Weights between two cut points, what they are given and what they should make of it.

    encoders: of each weight, by name; initial: what it is by now. count: calibration rows. data: arrays that `slope`
    takes. seed: of what is drawn.
    """

    encoders: Mapping[str, Encode]
    initial: Mapping[str, Initial]
    count: int
    data: Any
    function: Callable[..., Any]
    avals: Mapping[str, Any]
    walk: Walk
    seed: int

    @staticmethod
    def of(
        output: ir.Var,
        encoders: Mapping[str, Encode],
        initial: Mapping[str, Initial],
        walk: Walk,
        reference: Walk,
        seed: int,
    ) -> "SectionTask":
        """Runs the section as it was trained. encoders: of the weights of `initial`.

        walk: at the section's start, behind quantized weights; reference: there too, behind those that were trained.
        Raises OptionError for rows of different lengths.
        """
        lengths = {row["tokens"].shape[1] for row in walk.rows}
        if len(lengths) > 1:
            raise OptionError(
                f"what a section puts out is compared for calibration rows of one length, found {sorted(lengths)}"
            )
        given, names = walk.graph.names("arg"), walk.needed([output])
        others = [name for name in names if name not in encoders and name not in given]
        arguments = [name for name in names if name in given]
        data = {
            "others": [walk.current[name] for name in others],
            "arguments": [np.stack([row[name] for row in walk.rows]) for name in arguments],
            "values": [jnp.stack(walk.values)] if walk.values else [],
            "targets": jnp.stack(reference.outputs(output)),
        }
        return SectionTask(
            encoders,
            initial,
            len(walk.rows),
            data,
            walk.function([output], [*encoders, *others, *arguments], lengths.pop()),
            {name: walk.graph.aval(name) for name in encoders},
            walk,
            seed,
        )

    def slope(
        self, matrices: Sequence[jax.Array], data: Any, rows: jax.Array
    ) -> tuple[jax.Array, Sequence[jax.Array]]:
        """Returns the mean square of what the section puts out with other weights less what it did as trained, and its
        gradient.

        matrices: float32 [n, k] each, in order; rows: int32, of which calibration rows. What is held of one row on the
        way back is gone before the next.
        """

        def of_row(matrices: Sequence[jax.Array], row: jax.Array) -> jax.Array:
            arguments, values = ([array[row] for array in data[key]] for key in ("arguments", "values"))
            each = zip(self.encoders.values(), matrices, self.avals.values(), strict=True)
            made = [encode.layout.weight(matrix, aval.shape).astype(aval.dtype) for encode, matrix, aval in each]
            (found,) = self.function([*made, *data["others"], *arguments], values)
            difference = found.astype(jnp.float32) - data["targets"][row].astype(jnp.float32)
            return jnp.square(difference).sum() / (rows.size * difference.size)

        def add(total: Any, row: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(of_row)(matrices, row)), None

        zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, matrices)
        return jax.lax.scan(add, zeros, rows)[0]

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function of arrays, which is compiled once for sections that are alike."""
        compiled = self.walk.compiled(("section", self.walk.at), function, *arguments)
        return jax.block_until_ready(compiled(*arguments))
