"""The programs of a small quantized model in bfloat16, as they are compiled for accelerators."""

import functools

import jax.numpy as jnp
from flax import nnx

import xlathe as xl
from xlathe.aot import Buckets, to_step, units
from xlathe.graph import Graph, Record
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes.cache_layout import CacheLayout
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.quantize import Quantize
from xlathe.passes.specialize import Specialize
from xlathe.pipeline import Pass

CONFIG = LlamaConfig(vocab=256, width=256, layers=2, query_heads=4, key_value_heads=2, head_dim=64, hidden=512)


# Passes after the others, and what they make of the model.
SCHEMES: dict[str, tuple[Pass, ...]] = {
    "int8": (Quantize(),),
    "int4": (Quantize("int4"),),
    "int4, pages": (Quantize("int4", group=64, symmetric=False), KVCache(), CacheLayout("paged")),
    "int4, pages of int8": (Quantize("int4"), KVCache(), CacheLayout("paged", dtype="int8")),
}


@functools.cache
def step(scheme: str) -> Graph:
    """The step graph of the model."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear | nnx.Embed | nnx.RMSNorm):
            module.dtype = jnp.bfloat16
    graph = xl.trace(model, max_len=128)
    for pass_ in (Canonicalize(), FuseAttention(), *SCHEMES[scheme]):
        graph = pass_(graph)
    return to_step(graph)


def chosen_for(target: str, scheme: str) -> Record:
    """What lowering did to a decode step of two rows."""
    pages = {"pages": 20, "row_pages": 8} if "pages" in scheme else {"slots": 128}
    return LowerKernels(target)(Specialize(tokens=2, selected=2, rows=2, **pages)(step(scheme))).history[-1]


def programs(target: str, scheme: str) -> list[xl.aot.Unit]:
    """A prefill of 16 tokens and a decode loop of 8, for 1 and for 2 rows."""
    return list(units(step(scheme), Buckets.of(2, 128, 8, (16,)), target))
