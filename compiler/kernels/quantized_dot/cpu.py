"""quantized_dot on CPU, by the kernel in cpu.cc through the XLA FFI."""

import jax
import jax.numpy as jnp

from xlathe.errors import OptionError
from xlathe.kernels import native

TARGET_INT8 = "xlathe.quantized_dot.int8"


def quantized_dot(x: jax.Array, codes: jax.Array, scale: jax.Array, *, isa: str = "auto") -> jax.Array:
    """`(x @ codes.T) * scale` in float32, without expanding the weight in memory.

    A row of the result has the same bits whatever the number of rows, threads or the block sizes.

    Args:
      x: float32 [M, K].
      codes: int8 [N, K].
      scale: float32 [N], one a row of codes.
      isa: instruction set; "auto" is the best of the CPU that runs the program. Others are for tests.

    Returns:
      float32 [M, N].

    Raises:
      OptionError: a shape or dtype differs from the above.
      XlatheError: the kernels were not built.
    """
    _check(x, codes, scale)
    native.register()
    result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGET_INT8, result)(x, codes, scale, isa=isa)


def _check(x: jax.Array, codes: jax.Array, scale: jax.Array) -> None:
    operands = {"x": (x, "float32", 2), "codes": (codes, "int8", 2), "scale": (scale, "float32", 1)}
    fits = all(a.dtype == dtype and a.ndim == ndim for a, dtype, ndim in operands.values())
    if fits and x.shape[1] == codes.shape[1] and codes.shape[0] == scale.shape[0]:
        return
    found = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, (a, _, _) in operands.items())
    raise OptionError(
        f"quantized_dot: expected x float32 [M, K], codes int8 [N, K], scale float32 [N]; found {found}"
    )
