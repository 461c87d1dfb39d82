"""How fast the demo's model decodes with zeros in its layers, beside the same without: they bring no speed.

`python -m xlathe.tools.bench_zeros`. All ways take turns, so that a disturbance of the machine meets them alike.
"""

from rich.console import Console
from rich.table import Table

from xlathe.program import compile
from xlathe.report import weight_bytes
from xlathe.tools.console import bar
from xlathe.tools.measure import speeds
from xlathe.tools.source import parse_passes, trace_demo
from xlathe.tools.stages import machine
from xlathe.tools.text import held_out_windows

WAYS = {
    "dense": "scheme=bf16",
    "zeros among floats": "scheme=bf16,method=magnitude",
    "2 of 4, left out": 'scheme="bf16:2of4"',
    "50 %, left out": 'scheme="bf16:50%"',
}
ROUNDS, PROMPT, NEW = 11, 16, 32


def main() -> None:
    console, graph = Console(), trace_demo("target")
    with bar(console, "compile") as progress:
        small = [parse_passes(f'quantize{{{way},weights="layers/.*"}}')(graph) for way in WAYS.values()]
        programs = [(compile(each, max_len=64), weight_bytes(each)) for each in small]
        found = speeds(programs, held_out_windows(1024)[0, :PROMPT].tolist(), NEW, ROUNDS, progress)
    console.print(machine())
    table = Table("layers in bf16", caption=f"{NEW} tokens after {PROMPT}, medians of {ROUNDS}")
    for heading in ("MB", "tokens/s", "of the dense"):
        table.add_column(heading, justify="right")
    for name, (_, size), speed in zip(WAYS, programs, found, strict=True):
        table.add_row(name, f"{size / 1e6:.1f}", f"{speed.decode:.0f}", f"{speed.decode / found[0].decode:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
