"""Measures the conversion of a checkpoint to Q8_0: time beside its parts, copying and encoding, and memory.

`python -m xlathe.tools.bench_convert` takes the sizes of Llama 3.2 1B, in bfloat16 (6 GB of a temporary directory).
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.convert import convert
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.formats.gguf.blocks import Type, encode
from xlathe.tools.process_memory import memory_of

ONE_B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of the source, of its largest tensor and of anonymous memory at the peak; seconds, the best of all runs."""

    source: int
    largest: int
    peak: int
    copying: float
    encoding: float
    converting: float


def random_llama(config: dict[str, object], seed: int = 0) -> Checkpoint:
    """Returns a Llama of bfloat16 weights, each made when it is read."""
    width, hidden, vocab, layers, heads, few = (
        int(str(config[key]))
        for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers",
                    "num_attention_heads", "num_key_value_heads")
    )  # fmt: skip
    numbers = np.random.default_rng(seed).normal(size=1 << 22).astype(BFLOAT16)
    narrow = width // heads * few
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for b in range(layers):
        for part, rows in {"q": width, "k": narrow, "v": narrow, "o": width}.items():
            shapes[f"model.layers.{b}.self_attn.{part}_proj.weight"] = (rows, width)
        for part, shape in {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}.items():
            shapes[f"model.layers.{b}.mlp.{part}_proj.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{b}.{norm}.weight"] = (width,)
    made = {name: Tensor(shape, BFLOAT16, lambda s=shape: np.resize(numbers, s)) for name, shape in shapes.items()}  # type: ignore[misc]
    return Checkpoint(Card(config), made, "random numbers")


def measure(config: dict[str, object], folder: Path, rounds: int) -> Measured:
    """Writes a random checkpoint and converts it; copy, encoding and conversion take turns."""
    source, copy, made = (folder / f"{name}.gguf" for name in ("source", "copy", "made"))
    write_gguf(random_llama(config), source, "BF16")
    peak: list[int] = []
    times = [
        (
            _timed(lambda: shutil.copyfile(source, copy)),
            _timed(lambda: _encode(source)),
            _timed(lambda: convert(source, made, "Q8_0", lambda done, total: peak.append(memory_of("RssAnon") or 0))),
        )
        for _ in range(rounds)
    ]
    largest = max(tensor.read().nbytes for tensor in read_gguf(source).tensors.values())
    return Measured(source.stat().st_size, largest, max(peak), *map(min, zip(*times, strict=True)))


def _encode(source: Path) -> None:
    for tensor in read_gguf(source).tensors.values():
        if len(tensor.shape) > 1:
            for _ in encode(tensor.read(), Type.Q8_0):
                pass


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(config: dict[str, object], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(dataclasses.asdict(measure(config, Path(folder), rounds))))


if __name__ == "__main__":
    main({**ONE_B, **json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")}, rounds=3)
