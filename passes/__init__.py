"""The passes: one pass, one file."""

from collections.abc import Mapping

from xlathe.pass_text import pass_name
from xlathe.passes.cache_layout import CacheLayout
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.prune import PruneStructured
from xlathe.passes.quantize import AwqScales, Budget, FakeQuantize, Quantize, Rotate, SmoothQuant
from xlathe.passes.rotate_heads import RotateHeads
from xlathe.passes.specialize import Specialize
from xlathe.pipeline import Pass

PASSES: Mapping[str, type[Pass]] = {
    pass_name(cls): cls
    for cls in (
        *(Canonicalize, FuseAttention, PruneStructured, Rotate, AwqScales, SmoothQuant, FakeQuantize, Quantize, Budget),
        *(RotateHeads, KVCache, CacheLayout, Specialize, LowerKernels),
    )
}
"""Pass classes by the name that they have in the text of a pipeline."""

__all__ = [
    "PASSES",
    "AwqScales",
    "Budget",
    "CacheLayout",
    "Canonicalize",
    "FakeQuantize",
    "FuseAttention",
    "KVCache",
    "LowerKernels",
    "PruneStructured",
    "Quantize",
    "Rotate",
    "RotateHeads",
    "SmoothQuant",
    "Specialize",
]
