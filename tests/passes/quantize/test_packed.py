"""Weights that arrive packed in parts that a graph cannot multiply with: floats, and the report says why."""

import numpy as np

from tests.models.layouts.write_models import float_graph
from xlathe.passes.quantize.packed import keep_packed
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import parse_format

NAME = "layers/0/attention/key/kernel"  # 64 inputs, 32 outputs


def test_parts_of_other_shapes() -> None:
    """Before: a matrix whose parts are of [64, 32]. Expected: what is told names the parts, not the product."""
    parts = {name: zeros(part.shape, part.dtype) for name, part in parse_format("int4:g32").parts(64, 32).items()}
    kept = keep_packed(float_graph(), {NAME: Packed("int4:g32", parts)})
    assert kept.record.hits == {"weight": 0}
    assert kept.record.misses == (
        f"{NAME} is packed in parts of other shapes than int4:g32 has over the axis that a product sums over",
    )


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    return Tensor(shape, np.dtype(dtype), lambda: np.zeros(shape, dtype))
