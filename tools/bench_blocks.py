"""How fast a 1B Llama decodes from the blocks of a GGUF file, beside llama.cpp on the same file in the same run.

`python -m xlathe.tools.bench_blocks ['{"num_hidden_layers": 2}' [MIX...]]`, where the optional extra `llama` is
installed (2 GB of a temporary directory). All take turns, on as many threads as the process has cores (`taskset -c 0`
gives it one), and numbers are medians. On a machine that others use too, seconds of its cores are what compares: a
thread of llama.cpp waits for the others in a loop. The share of memory is that of reading the matrices once a token,
beside the fastest sum of a large array.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from xlathe.models.formats.gguf import write_gguf
from xlathe.models.formats.gguf.container import open_container
from xlathe.models.pretrained import from_pretrained
from xlathe.program import compile
from xlathe.tools.bench_convert import random_llama
from xlathe.tools.bench_decode import read_rate
from xlathe.tools.bench_quantize import SHAPE
from xlathe.tools.console import make_console
from xlathe.tools.stages import machine

MIXES = ("Q4_0", "Q8_0", "Q4_K_M")
PROMPT, NEW, ROUNDS = 16, 32, 3
Run = Callable[[], tuple[float, float, float, np.ndarray]]
"""Completes the prompt: tokens a second of the prompt and after it, CPU seconds a new token, and the new tokens."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Medians of one way: tokens a second of the prompt and after it, milliseconds of all cores a new token; and how
    many of the first new tokens are llama.cpp's."""

    prefill: float
    decode: float
    cpu: float
    same: int


def ours(path: Path, prompt: Sequence[int], activations: str | None) -> Run:
    length = PROMPT + NEW
    graph = from_pretrained(path, max_len=length, activations=activations)
    program = compile(graph, max_len=length, unit=NEW, chunks=(PROMPT,))

    def run() -> tuple[float, float, float, np.ndarray]:
        (first,) = program.generate([list(prompt)], max_tokens=1)
        start = time.process_time()
        (found,) = program.generate([list(prompt)], max_tokens=NEW)
        both = time.process_time() - start
        start = time.process_time()
        program.generate([list(prompt)], max_tokens=1)
        spent = both - (time.process_time() - start)
        stats = found.stats
        decode = stats.new_tokens / stats.decode_seconds
        return PROMPT / first.stats.prefill_seconds, decode, spent / (NEW - 1), np.asarray(found.tokens)

    return run


def llama_cpp(path: Path, prompt: Sequence[int], threads: int) -> Run:
    from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]  # an extra: llama

    model = Llama(
        str(path), verbose=False, n_ctx=PROMPT + NEW, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads
    )

    def run() -> tuple[float, float, float, np.ndarray]:
        model.reset()
        start = time.perf_counter()
        model.eval(list(prompt))
        tokens = [last_choice(model)]
        read, cpu = time.perf_counter(), time.process_time()
        while len(tokens) < NEW:
            model.eval(tokens[-1:])
            tokens.append(last_choice(model))
        decode = (NEW - 1) / (time.perf_counter() - read)
        return PROMPT / (read - start), decode, (time.process_time() - cpu) / (NEW - 1), np.asarray(tokens)

    return run


def last_choice(model: Any) -> int:
    """Returns the likeliest token, read from llama.cpp's own memory: its Python class keeps no logits by default."""
    logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
    return int(logits.argmax())


def measure(ways: Mapping[str, Run], peer: str) -> dict[str, Measured]:
    """Runs all in turns; the first round does not count."""
    rounds = [{name: run() for name, run in ways.items()} for _ in range(ROUNDS + 1)][1:]
    expected = rounds[0][peer][3]

    def median(name: str, column: int) -> float:
        return statistics.median(float(each[name][column]) for each in rounds)

    def same(name: str) -> int:
        tokens = rounds[0][name][3]
        return int((np.cumsum(tokens[: len(expected)] != expected[: len(tokens)]) == 0).sum())

    return {name: Measured(median(name, 0), median(name, 1), median(name, 2), same(name)) for name in ways}


def matrices(path: Path) -> int:
    """Returns the bytes that a token reads: of all matrices but the embedding, of which it reads a row."""
    entries = open_container(path).entries.values()
    return sum(entry.size for entry in entries if entry.name != "token_embd.weight")


def main(config: Mapping[str, Any], mixes: Sequence[str]) -> None:
    console, threads = make_console(), len(os.sched_getaffinity(0))
    title = f"{machine()}, {threads} used; prompt of {PROMPT} tokens, {NEW} new ones, median of {ROUNDS}"
    columns = ("prefill", "decode", "llama.cpp's", "memory's", "cores' ms", "llama.cpp's", "same")
    prompt = np.random.default_rng(1).integers(0, config["vocab_size"], PROMPT).tolist()
    for mix in mixes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            write_gguf(random_llama(dict(config)), path, mix)
            ways = {"blocks": ours(path, prompt, None), "a=int8": ours(path, prompt, "int8")}
            found = measure({**ways, "llama.cpp": llama_cpp(path, prompt, threads)}, "llama.cpp")
            limit = read_rate(ROUNDS) / matrices(path)
        peer, table = found["llama.cpp"], Table("mix", "way", *columns, title=title)
        for name, each in found.items():
            rates = (f"{each.prefill:.1f}", f"{each.decode:.2f}", f"{each.decode / peer.decode:.2f}")
            shares = (f"{each.decode / limit:.0%}", f"{1e3 * each.cpu:.1f}", f"{peer.cpu / each.cpu:.2f}")
            table.add_row(mix, name, *rates, *shares, str(each.same))
        console.print(table)


if __name__ == "__main__":
    main({**SHAPE, "max_position_embeddings": 2048, **json.loads((sys.argv[1:] or ["{}"])[0])}, sys.argv[2:] or MIXES)
