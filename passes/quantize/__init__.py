"""Quantization: the pass, and one file a method."""

from xlathe.passes.quantize.quantize import Quantize

__all__ = ["Quantize"]
