"""`xlathe convert`: writes a checkpoint in another file format, or its numbers in another type."""

import math
from typing import TYPE_CHECKING

from absl import flags
from rich.table import Table

from xlathe.tools.command import Options, Verb
from xlathe.tools.console import byte_bar, make_console

if TYPE_CHECKING:
    from xlathe.models.formats.gguf import Plan

WIDTH = 110  # columns that a plan takes, also where it is piped


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "type",
        None,
        "of the numbers: F32, F16, BF16; in a GGUF file also Q8_0, Q6_K, Q5_K_M, Q4_K_M and llama.cpp's other mixes; "
        "by default Q8_0 there, the source's in a directory",
        flag_values=values,
    )
    flags.DEFINE_string(
        "imatrix",
        None,
        "an importance matrix by llama.cpp's imatrix, GGUF or .dat: weighs errors in a GGUF file",
        flag_values=values,
    )


def run(options: Options, source: str, destination: str) -> None:
    from xlathe.models.formats.convert import convert

    console = make_console()
    with byte_bar(console, "convert") as progress:
        written = convert(
            source,
            destination,
            options["type"],
            progress,
            options["imatrix"],
            lambda plan: console.print(plan_table(plan), width=max(console.width, WIDTH)),
        )
    console.print(f"{destination}: {written:,} bytes of numbers", soft_wrap=True)


def plan_table(plan: "Plan") -> Table:
    """Returns a line a tensor: type, bits a weight, bytes before and after; `*` where importance is known."""
    table = Table(box=None, pad_edge=False)
    for column in ("tensor", "shape", "type", "bits", "before", "after"):
        table.add_column(column, justify="left" if column in ("tensor", "type") else "right", no_wrap=True)
    for tensor, before in zip(plan.tensors, plan.before, strict=True):
        shape, mark = tensor.plan.shape, "" if tensor.importance is None else "*"
        bits = 8 * tensor.size / math.prod(shape)
        sizes = (f"{before:,}", f"{tensor.size:,}")
        table.add_row(tensor.plan.name, str(list(shape)), tensor.type.name + mark, f"{bits:.4f}", *sizes)
    table.add_row("all", "", "", f"{plan.bits_per_weight:.4f}", f"{sum(plan.before):,}", f"{plan.size:,}")
    return table


VERB = Verb(
    "convert",
    "write a checkpoint, a GGUF file or a Hugging Face directory, as a .gguf file or a directory",
    ("SOURCE", "OUT"),
    define,
    run,
)
