"""Quantization: the pass, what prepares a model for it, and one file a method."""

from xlathe.passes.quantize.budget import Budget
from xlathe.passes.quantize.fake import FakeQuantize
from xlathe.passes.quantize.quantize import Quantize
from xlathe.passes.quantize.rotate import Rotate
from xlathe.passes.quantize.scaling import AwqScales, SmoothQuant

__all__ = ["AwqScales", "Budget", "FakeQuantize", "Quantize", "Rotate", "SmoothQuant"]
