"""Damaged checkpoints without end: `make fuzz SECONDS=60 [SEED=7]`.

Sound files are damaged at random and read whole. Anything but success or a CheckpointError fails, and so does a
reader that takes longer than `SLOW` or more memory than `MEMORY`; what failed is kept in build/fuzz.
"""

import dataclasses
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.models.formats.gguf.build import small
from tests.models.layouts.cases import Case
from tests.models.layouts.write_models import quantized_graph
from xlathe.card import Card
from xlathe.errors import CheckpointError
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.container import open_container
from xlathe.models.formats.huggingface import CONFIG as CONFIG_FILE
from xlathe.models.formats.huggingface import WEIGHTS, read_huggingface
from xlathe.safetensors_file import read_safetensors, write_safetensors

SLOW = 5.0  # seconds a file of a few kB, on a busy machine
MEMORY = 1 << 30  # bytes beyond what the process has when it starts
EDGES = [0, 1, 2, 3, 7, 8, 31, 32, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
CONFIG = {
    "model_type": "mixtral", "num_hidden_layers": 1, "max_position_embeddings": 8, "hidden_size": 32,
    "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    "vocab_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": True,
    "rope_theta": 1e4, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
LAID_OUT = (
    Case("gptq", "int4:g32"),
    Case("awq", "int4:g32,asym"),
    Case("compressed-tensors", "int4:g32"),
    Case("compressed-tensors", "fp8_e4m3:b32x32"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, and sound files to damage."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], None]


def targets(folder: Path) -> tuple[Target, ...]:
    """Makes the sound files in `folder`."""
    tensors = {
        name: Tensor(shape, np.dtype(np.float32), lambda shape=shape: np.ones(shape, np.float32))
        for name, shape in _shapes().items()
    }
    for kind in ("F32", "Q8_0"):
        write_gguf(Checkpoint(Card(CONFIG), tensors, "fuzz"), folder / kind, kind)
    write_safetensors(folder / "safetensors", tensors)
    whole = tuple((folder / kind).read_bytes() for kind in ("F32", "Q8_0"))
    return (
        Target("container", (small(), *whole), read_container),
        Target("gguf", whole, lambda path: read_all(read_gguf(path).tensors)),
        Target("safetensors", ((folder / "safetensors").read_bytes(),), lambda path: read_all(read_safetensors(path))),
        Target("layouts", tuple(laid_out(case, folder / case.layout) for case in LAID_OUT), read_laid_out),
    )


def laid_out(case: Case, folder: Path) -> bytes:
    """Returns the configuration of a quantized model in another tool's layout, a zero, and its file of tensors."""
    quantized_graph(case).save_pretrained(folder, layout=case.layout)
    return (folder / CONFIG_FILE).read_bytes() + b"\0" + (folder / WEIGHTS).read_bytes()


def read_laid_out(path: Path) -> None:
    config, _, tensors = path.read_bytes().partition(b"\0")
    folder = path.with_name(f"{path.name}-folder")
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS).write_bytes(tensors)
    read_all(read_huggingface(folder).tensors)


def _shapes() -> dict[str, tuple[int, ...]]:
    layer = "model.layers.0."
    experts = {f"{layer}block_sparse_moe.experts.{e}.w{i}.weight": (32, 32) for e in range(2) for i in (1, 2, 3)}
    return {
        "model.embed_tokens.weight": (4, 32),
        "model.norm.weight": (32,),
        f"{layer}self_attn.q_proj.weight": (32, 32),
        f"{layer}self_attn.k_proj.weight": (16, 32),
        f"{layer}block_sparse_moe.gate.weight": (2, 32),
        **experts,
    }


def read_container(path: Path) -> None:
    found = open_container(path)
    read_all({name: as_tensor(found, entry) for name, entry in found.entries.items()})


def read_all(tensors) -> None:
    for tensor in tensors.values():
        array = tensor.read()
        assert array.shape == tensor.shape and array.dtype == tensor.dtype


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Returns the content with one to four damages: numbers of any width replaced, cut, doubled, removed, ended."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, len(data)) if rng.random() < 0.3 else min(len(data), 1500) + 1))
        size = int(rng.choice([1, 4, 8]))
        match rng.integers(0, 6):
            case 0:
                data[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1 | 2:
                edge = EDGES[rng.integers(0, len(EDGES))] % (1 << 8 * size)
                data[at : at + size] = struct.pack("<Q", edge)[:size]
            case 3:
                data[at:at] = data[at : at + int(rng.integers(1, 64))]
            case 4:
                del data[at : at + int(rng.integers(1, 64))]
            case 5:
                del data[at + int(rng.integers(0, len(data) + 1)) :]
    return bytes(data)


def attempt(target: Target, content: bytes, path: Path) -> bool:
    """Reads damaged content; says whether it was read. Raises what a reader must not raise."""
    path.write_bytes(content)
    refused = None
    try:
        target.read(path)
    except CheckpointError as error:
        refused = str(error)
    assert refused is None or str(path) in refused, f"no file named: {refused}"
    return refused is None


def run(seconds: float, seed: int, keep: Path) -> int:
    """Fuzzes every target in turn; returns the number of files tried."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    rng, tried, read = np.random.default_rng(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        made = targets(Path(folder))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            target = made[tried % len(made)]
            content = damage(target.seeds[rng.integers(0, len(target.seeds))], rng)
            try:
                start = time.perf_counter()
                read += attempt(target, content, Path(folder) / "damaged")
                took = time.perf_counter() - start
                assert took < SLOW or tried < len(made), f"{took:.1f} s"  # the first of each may compile
            except BaseException:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{target.name}-{seed}-{tried}").write_bytes(content)
                raise
            tried += 1
    print(f"{tried:,} damaged files, {read:,} of them still sound, the others refused")
    return tried


if __name__ == "__main__":
    run(float(sys.argv[1]), int(sys.argv[2]), Path("build/fuzz"))
