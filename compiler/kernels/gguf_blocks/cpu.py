"""Encoders of GGUF's blocks on CPU, by the kernel in cpu.cc through the XLA FFI."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.gguf_blocks.layouts import LAYOUTS

TARGET = "xlathe.gguf_blocks"


def encode(x: Array | np.ndarray, type: str, importance: np.ndarray | None = None, isa: str = "auto") -> np.ndarray:
    """Returns the blocks of rows, the bytes that `reference.encode` returns, on all threads of XLA's CPU client.

    Args:
      x: float32, float16 or bfloat16 [rows, columns], columns a multiple of the block's numbers.
      type: a name in `LAYOUTS`.
      importance: float32 [columns], the weights of squared errors; None where they are not known.
      isa: instruction set, of which every one gives the same bytes; others than "auto" are for tests.

    Returns:
      uint8 [rows, columns / numbers of a block * bytes of a block].

    Raises:
      OptionError: a shape or type differs from the above.
      FloatingPointError: a number is no finite one, or a scale is larger than float16 holds.
      XlatheError: the kernels were not built.
    """
    numbers = LAYOUTS[type].numbers
    if x.ndim != 2 or x.shape[1] % numbers or (importance is not None and importance.shape != x.shape[1:]):
        given = "" if importance is None else f" and importance {list(importance.shape)}"
        raise OptionError(f"{type}: expected [rows, a multiple of {numbers}], found {list(x.shape)}{given}")
    native.register()
    weights = np.zeros(0, np.float32) if importance is None else importance
    with jax.default_device(jax.devices("cpu")[0]):
        blocks, wrong = _encode(x, weights, type=type, isa=isa)
    LAYOUTS[type].check(int(np.asarray(wrong)[0]))
    return np.asarray(blocks)


@functools.partial(jax.jit, static_argnames=("type", "isa"))
def _encode(x: Array, importance: Array, *, type: str, isa: str) -> tuple[Array, Array]:
    layout = LAYOUTS[type]
    out = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // layout.numbers * layout.bytes), jnp.uint8)
    wrong = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = jax.ffi.ffi_call(TARGET, (out, wrong))
    blocks, found = call(x.astype(jnp.float32), importance, type=type, isa=isa)
    return blocks, found
