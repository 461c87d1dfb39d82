"""The table of methods and schemes on the model that ships with xlathe: what each costs, on text that is held out.

`python -m xlathe.tools.scoreboard --update` measures every row anew and writes the table into the documentation;
`--update FOLDER` keeps rows there, and goes on where it was interrupted. A row is added as a line of `ENTRIES`.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xlathe.passes import Budget, Canonicalize, FuseAttention
from xlathe.pipeline import Pipeline
from xlathe.tools.command import Options
from xlathe.tools.console import make_console
from xlathe.tools.protocol import LLAMA_CPP
from xlathe.tools.source import CALIBRATION_ROWS, DEMO
from xlathe.tools.sweep import sweep
from xlathe.tools.sweep_report import HEADINGS, Report, caption, cells, front
from xlathe.tools.sweep_rows import GGUF, IMATRIX, Row

README: Final = Path("passes/quantize/README.md")  # of a checkout
BEGIN, END = "<!-- scoreboard: begin -->\n", "<!-- scoreboard: end -->"
CAPTION: Final = "*Caption.* "
PREPARED: Final = "canonicalize,fuse_attention"  # what each pipeline begins with


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table; way: a pipeline as text, or `gguf:` and a file type, as `xlathe sweep` takes them."""

    method: str
    scheme: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.scheme}"


def quantized(method: str, scheme: str) -> Entry:
    """Returns a row of the pass `quantize` alone."""
    return Entry(method, scheme, f'{PREPARED},quantize{{scheme="{scheme}",method="{method}"}}')


def after(first: str, method: str, scheme: str) -> Entry:
    """Returns a row of `quantize` after a pass that readies the weights for it."""
    alone = quantized(method, scheme)
    return Entry(f"{first}, {method}", scheme, alone.way.replace(PREPARED, f"{PREPARED},{first}", 1))


def file_of(type: str) -> Entry:
    """Returns a row of a GGUF file."""
    return Entry("gguf", type, f"{GGUF}{type}")


def weighed(type: str) -> Entry:
    """Returns a row of a GGUF file whose errors an importance matrix weighs."""
    return Entry("gguf, imatrix", type, f"{GGUF}{type}{IMATRIX}")


def within(scheme: str, bits: float, schemes: Sequence[str], method: str) -> Entry:
    """Returns a row of the pass `budget` alone."""
    chosen = Pipeline([Canonicalize(), FuseAttention(), Budget(bits, schemes=tuple(schemes), method=method)])
    return Entry(f"budget, {method}", scheme, str(chosen))


# By size, the largest first; of one scheme, the plainest method first.
ENTRIES: Final[tuple[Entry, ...]] = (
    Entry("none", "float32", PREPARED),
    quantized("rtn", "bf16"),
    file_of("Q8_0"),
    quantized("rtn", "mxfp8"),
    quantized("rtn", "int8"),
    quantized("rtn", "int8:channel,a=int8_token"),
    after("smooth_quant", "rtn", "int8:channel,a=int8_token"),
    after("rotate", "rtn", "int8:channel,a=int8_token"),
    quantized("rtn", "fp8_e4m3:channel"),
    file_of("Q6_K"),
    weighed("Q6_K"),
    file_of("Q5_K_M"),
    weighed("Q5_K_M"),
    file_of("Q4_K_M"),
    weighed("Q4_K_M"),
    within("4.94 bits of q2_k to q8_0", 4.94, ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"), "search"),
    quantized("rtn", "int4:g32,asym"),
    file_of("Q4_K_S"),
    weighed("Q4_K_S"),
    file_of("Q4_0"),
    weighed("Q4_0"),
    quantized("rtn", "int4:g32"),
    quantized("gptq", "int4:g32"),
    quantized("rtn", "int4:g32,a=int8"),
    quantized("rtn", "nvfp4"),
    quantized("rtn", "nf4:g64"),
    quantized("rtn", "mxfp4"),
    quantized("rtn", "int4:g128,asym"),
    quantized("rtn", "int4:g128"),
    quantized("hqq", "int4:g128"),
    quantized("search", "int4:g128"),
    after("awq_scales", "clip", "int4:g128"),
    quantized("gptq", "int4:g128"),
    quantized("auto_round{steps=50}", "int4:g128"),
    file_of("Q3_K_M"),
    weighed("Q3_K_M"),
    file_of("Q2_K"),
    weighed("Q2_K"),
    quantized("rtn", "int3:g64,asym"),
    quantized("gptq", "int3:g64,asym"),
    quantized("rtn", "int2:g64,asym"),
    quantized("gptq", "int2:g64,asym"),
    quantized("auto_round{steps=50}", "int2:g64,asym"),
)


def markdown(report: Report) -> str:
    """Returns the table, and below it what its columns are and what went wrong."""
    best, named = front(report.rows), {row.name: row for row in report.rows}
    lines = [_line(("method", "scheme", *HEADINGS)), "|---|---|" + "---:|" * len(HEADINGS)]
    for entry in ENTRIES:
        row = named.get(entry.name, Row(entry.name, entry.way, error="not measured"))
        lines.append(_line((f"`{entry.method}`", f"`{entry.scheme}`", *cells(row, best))))
    errors = [f"* `{row.name}`: {row.error}" for row in report.rows if row.error]
    return "\n".join([*lines, "", CAPTION + caption(report) + ".", *([""] if errors else []), *errors]) + "\n"


def _line(texts: Sequence[str]) -> str:
    joined = " | ".join(text.replace("\n", " ") for text in texts)
    return f"| {joined} |"


def in_readme(text: str) -> str:
    """Returns the block of the documentation that `--update` writes."""
    return text.partition(BEGIN)[2].partition(END)[0]


def update(folder: Path) -> None:
    """Measures what is not in the folder yet, and writes the table."""
    options: Options = {
        "text": None,
        "calibration": None,
        "calibration_rows": CALIBRATION_ROWS,
        "protocol": LLAMA_CPP.name,
        "context": None,
    }
    report = sweep(options, DEMO, folder, {entry.name: entry.way for entry in ENTRIES}, make_console())
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + markdown(report) + END + rest.partition(END)[2], encoding="utf-8")


def main(words: Sequence[str]) -> None:
    if not words or words[0] != "--update" or len(words) > 2 or not README.exists():
        sys.exit("usage, in a checkout: python -m xlathe.tools.scoreboard --update [FOLDER]")
    if len(words) == 2:
        update(Path(words[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        update(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
