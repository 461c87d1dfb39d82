"""A teacher and a student small enough to train in a test."""

import functools

import numpy as np
from flax import nnx

import xlathe as xl
from xlathe.graph import Graph
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.passes import Canonicalize, FuseAttention, PruneStructured

VOCAB = 61
PREPARED = xl.Pipeline([Canonicalize(), FuseAttention()])


@functools.cache
def teacher(vocab: int = VOCAB, layers: int = 2, width: int = 32, seed: int = 0) -> Graph:
    config = LlamaConfig(vocab, width, layers, query_heads=4, key_value_heads=2, head_dim=8, hidden=64)
    graph = PREPARED(xl.trace(Llama(config, rngs=nnx.Rngs(seed)), max_len=16))
    peaked = 8 * graph.arrays["embedding/embedding"]  # logits that say something
    return graph.with_weights({"embedding/embedding": peaked})


@functools.cache
def student(layers: int = 2) -> Graph:
    """Half of the heads and neurons of the teacher."""
    return PruneStructured(heads=0.5, neurons=0.5)(teacher(layers=layers))


def tokens(count: int = 400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count, dtype=np.int32)
