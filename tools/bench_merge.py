"""Measures merges of three checkpoints of 1B parameters, bfloat16: time and memory, beside mergekit's.

`python -m xlathe.tools.bench_merge [MERGEKIT-YAML [CONFIG-JSON [METHOD...]]]` takes the path of that command in an
environment of its own (10 GB of a temporary directory); without it, xlathe's alone are measured. Runs take turns. Linux
tells memory apart from files that are mapped.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from xlathe.models.formats.huggingface import write_huggingface
from xlathe.tools.bench_convert import ONE_B, random_llama
from xlathe.tools.bench_memory import BESIDE, COPIES, EVERY
from xlathe.tools.process_memory import memory_of

SHAPE: Final = {**ONE_B, "vocab_size": 32000, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
SPARSE: Final = {"weight": 0.5, "density": 0.5}
METHODS: Final = {  # what each model is given
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    **dict.fromkeys(("ties", "dare_ties", "della"), SPARSE),
    "karcher": {},
    "model_stock": {},
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """seconds: from start to end; peak: the most anonymous memory, in bytes; with_files: with mapped files;
    allowed: the peak that may be."""

    method: str
    by: str
    seconds: float
    peak: int
    with_files: int
    allowed: int


def measure(
    config: dict[str, object], folder: Path, mergekit: str | None, methods: Sequence[str]
) -> Iterator[Measured]:
    """Writes three random checkpoints and merges them by each method, by both programs in turn."""
    checkpoints = {name: random_llama(config, seed) for seed, name in enumerate(("base", "a", "b"))}
    for name, checkpoint in checkpoints.items():
        write_huggingface(checkpoint, folder / name)
    largest = max(tensor.nbytes for tensor in checkpoints["base"].tensors.values())
    ours = [
        sys.executable,
        "-c",
        "import sys; from xlathe.tools.main import main; sys.exit(main(sys.argv[1:]))",
        "merge",
    ]
    programs = {"xlathe": ours} | ({"mergekit": [mergekit]} if mergekit else {})
    for method in methods:
        recipe = folder / f"{method}.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(method, folder)))
        for name, words in programs.items():
            result = _run([*words, recipe.name, "out"], folder)
            shutil.rmtree(folder / "out")
            yield Measured(method, name, *result, COPIES * largest + BESIDE)


def _recipe(method: str, folder: Path) -> dict[str, Any]:
    based = {} if method in ("linear", "karcher") else {"base_model": str(folder / "base")}
    names = ("a", "b") if based else ("base", "a", "b")
    models = [{"model": str(folder / name), "parameters": METHODS[method]} for name in names]
    return {"merge_method": method, "dtype": "bfloat16", "models": models, **based}


def _run(words: Sequence[str], folder: Path) -> tuple[float, int, int]:
    start, peak, with_files = time.perf_counter(), 0, 0
    offline, log = {**os.environ, "HF_HUB_OFFLINE": "1"}, folder / "log"
    with (
        log.open("wb") as told,
        subprocess.Popen(words, stdout=told, stderr=subprocess.STDOUT, cwd=folder, env=offline) as process,
    ):
        while process.poll() is None:
            peak = max(peak, memory_of("RssAnon", process.pid) or 0)
            with_files = max(with_files, memory_of("VmHWM", process.pid) or 0)
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with {process.returncode}: {log.read_text()[-2000:]}")
    return time.perf_counter() - start, peak, with_files


def main(mergekit: str | None, config: dict[str, object], methods: Sequence[str] = tuple(METHODS)) -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for each in measure(config, Path(folder), mergekit, methods):
            print(json.dumps(dataclasses.asdict(each)), flush=True)
            found.append(each)
    for method in methods if mergekit else ():
        ours, theirs = (each.seconds for each in found if each.method == method)
        print(f"{method}: xlathe takes {ours / theirs:.2f} of mergekit's time")


if __name__ == "__main__":
    path, config, *methods = [*sys.argv[1:], *("", "{}")[len(sys.argv) - 1 :]]
    main(path or None, {**SHAPE, **json.loads(config)}, methods or tuple(METHODS))
