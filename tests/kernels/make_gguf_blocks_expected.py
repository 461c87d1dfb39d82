"""Writes gguf_blocks_expected.json: hashes of what llama.cpp makes of `gguf_blocks_cases`.

`python -m tests.kernels.make_gguf_blocks_expected`, where the optional extra `llama` is installed. Build it as its own
wheels are, for any x86-64: CMAKE_ARGS="-DGGML_NATIVE=OFF -DCMAKE_C_FLAGS=-ffp-contract=off
-DCMAKE_CXX_FLAGS=-ffp-contract=off".
"""

import ctypes
import hashlib
import json
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from tests.kernels import gguf_blocks_cases as cases
from xlathe.kernels.gguf_blocks.layouts import LAYOUTS

EXPECTED = Path(__file__).with_name("gguf_blocks_expected.json")


def encode(x: np.ndarray, type: str, importance: np.ndarray | None) -> np.ndarray:
    """Returns what ggml's `ggml_quantize_chunk` makes of float32 [rows, columns]."""
    import llama_cpp

    ggml = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, columns = x.shape
    out = np.zeros((rows, columns // LAYOUTS[type].numbers * LAYOUTS[type].bytes), np.uint8)
    pointer = ctypes.c_void_p(None) if importance is None else importance.ctypes.data_as(ctypes.c_void_p)
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(GGMLQuantizationType[type]),
        np.ascontiguousarray(x).ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        *map(ctypes.c_int64, (0, rows, columns)),
        pointer,
    )
    assert written == out.size
    return out


def digest(blocks: np.ndarray) -> str:
    return hashlib.sha256(blocks.tobytes()).hexdigest()


def main() -> None:
    import llama_cpp

    hashes = {
        type: {
            "plain": digest(encode(cases.rows(), type, None)),
            "importance": digest(encode(cases.rows(), type, cases.importance())),
        }
        for type in LAYOUTS
    }
    made = {
        "peer": f"llama-cpp-python {llama_cpp.__version__}",
        "flags": "-DGGML_NATIVE=OFF -ffp-contract=off, x86-64",
        "input": digest(cases.rows()) + digest(cases.importance()),
        "blocks": hashes,
    }
    EXPECTED.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
