"""The weights of the compared models: numbers that follow from a case and a tensor's name, so that none are stored."""

import zlib
from collections.abc import Mapping

import numpy as np

PEAKED = (
    *("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "c_attn", "query_key_value"),
    *("self.query", "self.key"),
)
INPUTS_FIRST = ("c_attn", "c_proj", "c_fc")  # GPT-2's matrices are [inputs, outputs]
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "wpe", "_embeddings")


def values(case: str, name: str, shape: tuple[int, ...], embedding: float = 1.0) -> np.ndarray:
    """Returns the float32 numbers of one tensor of a checkpoint.

    Scores of attention have a standard deviation of 2 to 3, so that few tokens are seen and masks and positions
    matter. Norms and biases are random too, so that a forgotten one shows.
    """
    seed = zlib.crc32(f"{case}/{name}".encode())
    normal = np.random.RandomState(seed).standard_normal(shape)  # the one stream that NumPy never changes
    return (_mean(name, shape) + _deviation(name, shape, embedding) * normal).astype(np.float32)


def _mean(name: str, shape: tuple[int, ...]) -> float:
    if len(shape) > 1 or name.endswith("bias"):
        return 0.0
    return 1.6 if "q_norm" in name or "k_norm" in name else 1.0


def _deviation(name: str, shape: tuple[int, ...], embedding: float) -> float:
    if len(shape) == 1:
        return 0.2
    if any(part in name for part in EMBEDDINGS):
        return embedding
    inputs = shape[0] if any(part in name for part in INPUTS_FIRST) else shape[-1]
    return (1.6 if any(part in name for part in PEAKED) else 1.0) / float(np.sqrt(inputs))


def checkpoint(case: str, shapes: Mapping[str, tuple[int, ...]], embedding: float = 1.0) -> dict[str, np.ndarray]:
    """Returns all tensors of a checkpoint by their names in the files."""
    return {name: values(case, name, tuple(shape), embedding) for name, shape in shapes.items()}
