"""GGUF, version 3: the one-file form of llama.cpp (github.com/ggml-org/ggml, docs/gguf.md)."""

from xlathe.models.formats.gguf.importance import read_importance
from xlathe.models.formats.gguf.read import read_gguf
from xlathe.models.formats.gguf.write import Plan, plan_gguf, write_gguf, write_plan

__all__ = ["Plan", "plan_gguf", "read_gguf", "read_importance", "write_gguf", "write_plan"]
