"""Writes quantized_expected.json: hashes of the files that llama.cpp makes of the models of `quantized_cases`.

`python -m tests.models.formats.gguf.make_quantized_expected`, where the optional extra `llama` is installed; how to
build it says tests/kernels/make_gguf_blocks_expected.py.
"""

import json
import tempfile
from pathlib import Path

from tests.models.formats.gguf.quantized_cases import cases, digest, importance_of, llama_cpp, load
from xlathe.models.formats.gguf import write_gguf

EXPECTED = Path(__file__).with_name("quantized_expected.json")


def main() -> None:
    import llama_cpp as peer

    hashes: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source.gguf", Path(folder) / "made.gguf"
        for model, mix, weighed in cases():
            write_gguf(load(model), source, "F32")
            status = llama_cpp(source, made, mix, importance_of(source) if weighed else None)
            assert status == 0, (model, mix, weighed)
            hashes.setdefault(model, {})[mix + (" importance" if weighed else "")] = digest(made)
    name = f"llama-cpp-python {peer.__version__}"
    flags = "-DGGML_NATIVE=OFF -ffp-contract=off, x86-64"
    EXPECTED.write_text(json.dumps({"peer": name, "flags": flags, "files": hashes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
