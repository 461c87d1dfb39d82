"""Models whose files show every rule of a mix, and what llama.cpp makes of their float32 files."""

import ctypes
import hashlib
import itertools
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.kernels.gguf_blocks_cases import bell
from tests.models.formats import families
from tests.models.tiny import LLAMA, MIXTRAL, tiny_checkpoint
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.gguf.container import open_container
from xlathe.models.formats.gguf.mixes import MIXES

WIDE = {"rms_norm_eps": 1e-5, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
MODELS = {
    "shared": {**LLAMA, **WIDE, "num_hidden_layers": 16, "num_key_value_heads": 1},
    "own": {**LLAMA, **WIDE, "num_hidden_layers": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "experts": {**MIXTRAL, **WIDE, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 8},
    "narrow": {**LLAMA, **WIDE, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4},
}
WRITTEN = [mix for mix in MIXES if mix not in ("F32", "F16", "BF16")]


def load(model: str) -> Checkpoint:
    """Returns one of `MODELS` with exact weights, or a family of `tests/models/formats/families.py`."""
    if model not in MODELS:
        return families.load(model)
    shapes = {name: tensor.shape for name, tensor in tiny_checkpoint(MODELS[model]).tensors.items()}
    arrays = {name: bell(zlib.crc32(name.encode()), *shape) / np.float32(16) for name, shape in shapes.items()}
    return families.of_arrays(MODELS[model], arrays)


def importance_of(path: Path) -> dict[str, np.ndarray]:
    """Returns weights for every matrix of a file but the embedding, float32 [matrices, columns]."""
    found = {}
    for name, entry in open_container(path).entries.items():
        if len(entry.shape) > 1 and name.endswith(".weight") and name != "token_embd.weight":
            matrices = int(np.prod(entry.shape[:-2]))
            found[name] = bell(zlib.crc32(name.encode()) + 1, matrices, entry.shape[-1]) ** 2
    return found


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Returns type and bytes by name, in the order of names."""
    file = open_container(path)
    return {name: (entry.type.name, file.bytes_of(entry).tobytes()) for name, entry in sorted(file.entries.items())}


def digest(path: Path) -> str:
    found = hashlib.sha256()
    for name, (type, data) in contents(path).items():
        found.update(f"{name} {type} {len(data)} ".encode() + data)
    return found.hexdigest()


def llama_cpp(source: Path, made: Path, mix: str, importance: Mapping[str, np.ndarray] | None, threads: int = 1) -> int:
    """Has llama.cpp quantize a file; returns 0 where it did."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = threads, int(MIXES[mix][1])
    if importance is not None:
        kind = llama_cpp.llama_model_imatrix_data
        entries = (kind * (len(importance) + 1))()
        for entry, (name, weights) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), weights.size
            entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(kind))
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(options)))


def cases() -> list[tuple[str, str, bool]]:
    """Returns models, mixes, and whether importance is given; Q2_K_S is not written without."""
    each = itertools.product(MODELS, WRITTEN, (False, True))
    return [(model, mix, weighed) for model, mix, weighed in each if weighed or mix != "Q2_K_S"]
