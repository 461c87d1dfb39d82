"""Peaked inputs for the kernels of attention, and how far from the truth a kernel may be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.ops.attention import attention as operation

Operands = tuple[jax.Array, ...]
WIDE = {f"{stage}_dtype": "float32" for stage in ("scores", "softmax", "probs", "out")}


def operands(b: int, t: int, s: int, k: int, g: int, d: int, e: int, *, dtype: str, seed: int = 0) -> Operands:
    """q, k, v from N(0, 1); every third query has a needle, a key that is four times the query of one head."""
    rng = np.random.default_rng(seed)
    q, keys, values = (rng.standard_normal(shape) for shape in ((b, t, k, g, d), (b, s, k, d), (b, s, k, e)))
    for i in range(0, t, 3):
        keys[:, i * s // (2 * t)] = 4 * q[:, i, :, 0]
    return tuple(jnp.asarray(x, dtype) for x in (q, keys, values))


def mask_of(kind: str | int | None, t: int, s: int) -> jax.Array | None:
    """bool [1, 1, 1, t, s]: causal, a window of so many keys, random pairs and the diagonal, or no mask."""
    distance = np.arange(t)[:, None] - np.arange(s)
    if kind is None:
        return None
    if kind == "random":
        keep = (np.random.default_rng(1).random((t, s)) < 0.1) | (distance == 0)
    else:
        keep = (distance >= 0) & (distance < (s if kind == "causal" else int(kind)))
    return jnp.asarray(keep)[None, None, None]


def options_of(dtype: str, mask: jax.Array | None, softcap: float | None = None) -> dict[str, Any]:
    """Attributes of the operation as a model in `dtype` has them, whose softmax is in float32."""
    stages = {"scores_dtype": "float32", "softmax_dtype": "float32", "probs_dtype": dtype, "out_dtype": dtype}
    return {"scale": 0.125, "softcap": softcap, "masked": mask is not None, "biased": False, **stages}


def assert_as_good(kernel: Callable[..., jax.Array], body: Callable[..., jax.Array], args: Any, options: Any) -> None:
    """Float32: 1e-5. Less: at most twice as far from float32 as the reference body in that dtype."""
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args]
    exact = body(*wide, **(options | WIDE))
    actual, plain = kernel(*args, **options), body(*args, **options)
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    allowed = 1e-5 if plain.dtype == jnp.float32 else 2 * difference(plain, exact)
    assert difference(actual, exact) <= allowed


def difference(actual: jax.Array, expected: jax.Array) -> float:
    return float(jnp.max(jnp.abs(actual.astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected)))


def check(
    kernel: Callable[..., jax.Array], sizes: tuple[int, ...], kind: str | int | None, softcap: float | None, dtype: str
) -> None:
    """The kernel beside the reference body of attention."""
    mask = mask_of(kind, *sizes[1:3])
    args = operands(*sizes, dtype=dtype)
    args = args if mask is None else (*args, mask)
    assert_as_good(kernel, operation.body, args, options_of(dtype, mask, softcap))


REFUSED = [
    ({"q": "bfloat16 1 8 2 3 80", "k": "bfloat16 1 8 2 80"}, {}, "heads of 64 or 128.* features; found 80 and 64"),
    ({"k": "bfloat16 1 8 3 64"}, {}, r"found \(1, 8, 2, 3, 64\) and \(1, 8, 3, 64\)"),
    ({"v": "bfloat16 1 7 2 64"}, {}, r"found \(1, 8, 2, 64\) and \(1, 7, 2, 64\)"),
    ({"v": "float32 1 8 2 64"}, {}, "found bfloat16, float32"),
    ({"mask": "bool 1 2 1 8 8"}, {}, r"found bool\[1, 2, 1, 8, 8\]"),
    ({"mask": "int8 1 1 1 8 8"}, {}, r"found int8\[1, 1, 1, 8, 8\]"),
    ({}, {"masked": False}, "if masked; found bool"),
    ({}, {"biased": True}, "expected no bias"),
    ({}, {"probs_dtype": "float32"}, "found bfloat16, float32"),
    ({}, {"scores_dtype": "float16"}, "found bfloat16, float16, float32"),
    ({"q": "bfloat16 1 0 2 3 64", "mask": "bool 1 1 1 1 8"}, {}, "no axis to be empty"),
]
GOOD = {"q": "bfloat16 1 8 2 3 64", "k": "bfloat16 1 8 2 64", "v": "bfloat16 1 8 2 64", "mask": "bool 1 1 1 8 8"}
