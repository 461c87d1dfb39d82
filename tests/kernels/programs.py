"""The programs of a small quantized model in bfloat16, as they are compiled for accelerators."""

import functools

import jax.numpy as jnp
from flax import nnx

import xlathe as xl
from xlathe.aot import Buckets, to_step, units
from xlathe.graph import Graph
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.quantize import Quantize
from xlathe.passes.specialize import Specialize

CONFIG = LlamaConfig(vocab=256, width=256, layers=2, query_heads=4, key_value_heads=2, head_dim=64, hidden=512)


@functools.cache
def step() -> Graph:
    """The step graph of the model, its weights in 8 bits."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear | nnx.Embed | nnx.RMSNorm):
            module.dtype = jnp.bfloat16
    graph = xl.trace(model, max_len=128)
    for pass_ in (Canonicalize(), FuseAttention(), Quantize()):
        graph = pass_(graph)
    return to_step(graph)


def chosen_for(target: str) -> dict[str, int]:
    """Which kernels a decode step of two rows gets."""
    lowered = LowerKernels(target)(Specialize(tokens=2, selected=2, rows=2, slots=128)(step()))
    return dict(lowered.history[-1].hits)


def programs(target: str) -> list[xl.aot.Unit]:
    """A prefill of 16 tokens and a decode loop of 8, for 1 and for 2 rows."""
    return list(units(step(), Buckets.of(2, 128, 8, (16,)), target))
