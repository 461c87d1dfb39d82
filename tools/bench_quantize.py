"""Measures the encoding of a 1B Llama in GGUF's mixes, beside llama.cpp on the same file in the same run.

`python -m xlathe.tools.bench_quantize ['{"num_hidden_layers": 2}' [MIX...]]`, where the optional extra `llama` is
installed. Both take turns on as many threads as there are cores; seconds are medians (6 GB of a temporary directory).
"""

import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from xlathe.models.formats.convert import convert
from xlathe.models.formats.gguf import write_gguf
from xlathe.models.formats.gguf.container import open_container
from xlathe.models.formats.gguf.mixes import MIXES
from xlathe.tools.bench_convert import ONE_B, random_llama
from xlathe.tools.console import make_console
from xlathe.tools.stages import machine

SHAPE = {**ONE_B, "vocab_size": 32000, "tie_word_embeddings": False}
MEASURED = ("Q4_0", "Q8_0", "Q4_K_M", "Q6_K", "Q2_K")
ROUNDS = 3


def llama_cpp(source: Path, made: Path, mix: str) -> None:
    """Has llama.cpp quantize a file, without its line for each tensor."""
    import llama_cpp as peer  # type: ignore[import-not-found, unused-ignore]  # an extra: llama

    quiet = peer.llama_log_callback(lambda level, text, data: None)
    peer.llama_log_set(quiet, None)
    options = peer.llama_model_quantize_default_params()
    options.nthread, options.ftype = os.cpu_count() or 1, int(MIXES[mix][1])
    status = peer.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(options))
    peer.llama_log_set(peer.llama_log_callback(), None)  # llama.cpp's own again: `quiet` ends here
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {mix}")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def same_bytes(first: Path, second: Path) -> bool:
    """Says whether two files have the same tensors."""
    a, b = open_container(first), open_container(second)
    return a.entries.keys() == b.entries.keys() and all(
        (a.bytes_of(a.entries[name]) == b.bytes_of(b.entries[name])).all() for name in a.entries
    )


def measure(source: Path, mix: str, folder: Path) -> tuple[float, float, bool]:
    """Returns our seconds and llama.cpp's, and whether the bytes are the same."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    times = [
        (seconds(lambda: convert(source, ours, mix)), seconds(lambda: llama_cpp(source, theirs, mix)))
        for _ in range(ROUNDS)
    ]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, same_bytes(ours, theirs)


def main(config: dict[str, object], mixes: Sequence[str]) -> None:
    console = make_console()
    table = Table("mix", "seconds", "llama.cpp's", "ratio", "same bytes", title=f"{machine()}, median of {ROUNDS}")
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.gguf"
        write_gguf(random_llama(config), source, "BF16")
        for mix in mixes:
            ours, theirs, same = measure(source, mix, Path(name))
            table.add_row(mix, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}", "yes" if same else "no")
    console.print(table)


if __name__ == "__main__":
    main({**SHAPE, **json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")}, sys.argv[2:] or MEASURED)
