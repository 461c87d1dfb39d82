"""GGUF, version 3: the one-file form of llama.cpp (github.com/ggml-org/ggml, docs/gguf.md)."""

from xlathe.models.formats.gguf.read import passed_on, read_gguf
from xlathe.models.formats.gguf.write import write_gguf

__all__ = ["passed_on", "read_gguf", "write_gguf"]
