"""quantized_dot on CPU, by the kernels in cpu*.cc through the XLA FFI."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot.coverage import BLOCKS, COVERED, GROUPS, blocks_of, group_of
from xlathe.ops.activations import round_tokens
from xlathe.ops.quantized_dot import quantized_dot as operation
from xlathe.storage import Blocks, Scaled, parse_format

TARGET_INT8 = "xlathe.quantized_dot.int8"
TARGETS_INT4 = {None: "xlathe.quantized_dot.int4", "int8": "xlathe.quantized_dot.int4_a8"}
"""By the rounding of activations."""
TARGET_BLOCKS = "xlathe.quantized_dot.blocks"
ON_CPU = f"{COVERED}, or blocks {', '.join(BLOCKS)}"
MANY = 32
"""Rows from which XLA's product of int8 with int8 is faster."""


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
    raise OptionError(f"quantized_dot: expected x float32 [M, K], codes int8 [N, K], scale float32 [N]; found {found}")


def quantized_dot_int4(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    activations: str | None = None,
    isa: str = "auto",
) -> jax.Array:
    """`x @ ((codes - zero) * scale).T` in float32, without expanding the weight in memory.

    A row of the result has the same bits whatever the number of rows, threads or the block sizes.

    Args:
      x: float32 [M, K].
      codes: uint8 [N, K / 2], the earlier of two in the low half of a byte.
      scale: bfloat16 [N, K / group], for a group in `GROUPS`.
      zero: uint8 [N, K / group]; all 8 if it is not given.
      activations: None: they are held as integers of 24 bits a block of 32, as exact as float32's products; or
        `int8`: they are rounded in blocks of 32 and multiplied as integers.
      isa: instruction set; "auto" is the best of the CPU that runs the program. Others are for tests.

    Returns:
      float32 [M, N].

    Raises:
      OptionError: a shape or dtype differs from the above.
      XlatheError: the kernels were not built.
    """
    _check_int4(x, codes, scale, zero)
    native.register()
    given = jnp.zeros((codes.shape[0], 0), jnp.uint8) if zero is None else zero
    result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGETS_INT4[activations], result)(x, codes, scale, given, isa=isa)


def _check_int4(x: jax.Array, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> None:
    operands = {"x": (x, "float32"), "codes": (codes, "uint8"), "scale": (scale, "bfloat16"), "zero": (zero, "uint8")}
    given = {name: (array, dtype) for name, (array, dtype) in operands.items() if array is not None}
    if all(array.dtype == dtype and array.ndim == 2 for array, dtype in given.values()):
        (_, k), n = x.shape, codes.shape[0]
        shapes = [(n, k // group) for group in GROUPS if k % group == 0]
        if codes.shape == (n, k // 2) and scale.shape in shapes and (zero is None or zero.shape == scale.shape):
            return
    found = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, (array, _) in given.items())
    raise OptionError(
        "quantized_dot: expected x float32 [M, K], codes uint8 [N, K / 2], scale bfloat16 [N, K / group], zero uint8 "
        f"like scale, and a group of {', '.join(map(str, GROUPS))}; found {found}"
    )


def _product_f16(x: jax.Array, codes: jax.Array, scale: jax.Array, *zero: jax.Array) -> jax.Array:
    """As `quantized_dot_int4` with float16 scales, by reading codes twice: each scale is a sum of two bfloat16.

    Its first 8 bits are cut off by a mask, for XLA may leave out a cast to bfloat16 and back; 3 bits are left.
    """
    wide = scale.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32) & jnp.uint32(0xFFFF0000)
    first = jax.lax.bitcast_convert_type(bits, jnp.float32)
    halves = [half.astype(jnp.bfloat16) for half in (first, wide - first)]
    return quantized_dot_int4(x, codes, halves[0], *zero) + quantized_dot_int4(x, codes, halves[1], *zero)


def is_f16(format: str, activations: str | None) -> bool:
    """Says whether this is a product with weights alone, of 4 bits in groups whose scales are float16."""
    stored = parse_format(format)
    if activations is not None or not isinstance(stored, Scaled) or stored.scale != "f16":
        return False
    return bool(group_of(str(dataclasses.replace(stored, scale="bf16"))))


def quantized_dot_blocks(
    x: jax.Array, blocks: jax.Array, *, stored: Blocks, activations: str | None = None, isa: str = "auto"
) -> jax.Array:
    """`x @ stored.dequantize(blocks).T` in float32, of blocks as they lie in a GGUF file.

    A row of the result has the same bits whatever the number of rows, threads or the block sizes.

    Args:
      x: float32 [M, K].
      blocks: uint8 [N, bytes of K weights].
      stored: their format, one of `BLOCKS`.
      activations: None: they are held as integers of 24 bits a block of 32 (with q8_0 of 22); or `int8`: they are
        rounded as the operation says.
      isa: instruction set; "auto" is the best of the CPU that runs the program. Others are for tests.

    Returns:
      float32 [M, N].

    Raises:
      OptionError: a shape or dtype differs from the above.
      XlatheError: the kernels were not built.
    """
    (m, k), n = x.shape, blocks.shape[0]
    expected = None if stored.misfit(n, k) else stored.parts(n, k)["blocks"].shape
    if x.dtype != "float32" or blocks.dtype != "uint8" or blocks.shape != expected:
        raise OptionError(
            f"quantized_dot: expected x float32 [M, K], blocks uint8 [N, bytes of K in {stored}]; found x "
            f"{x.dtype}{list(x.shape)}, blocks {blocks.dtype}{list(blocks.shape)}"
        )
    native.register()
    call = jax.ffi.ffi_call(TARGET_BLOCKS, jax.ShapeDtypeStruct((m, n), jnp.float32))
    return call(x, blocks, type=stored.layout.name, activations=activations or "", isa=isa)


def product(x: jax.Array, *parts: jax.Array, out_dtype: str, format: str, activations: str | None = None) -> jax.Array:
    """As the operation `xlathe.ops.quantized_dot`, for what `uncovered` has nothing against."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    stored = blocks_of(format)
    if activations not in (None, "int8"):
        y = _rounded_product(flat, *parts, format=format, activations=activations)
    elif stored:
        y = quantized_dot_blocks(flat, *parts, stored=stored, activations=activations)
    elif group_of(format):
        y = quantized_dot_int4(flat, *parts, activations=activations)
    elif is_f16(format, activations):
        y = _product_f16(flat, *parts)
    else:
        y = quantized_dot(flat, *parts)
    return y.reshape(*x.shape[:-1], parts[0].shape[0]).astype(out_dtype)


def _rounded_product(x: jax.Array, *parts: jax.Array, format: str, activations: str) -> jax.Array:
    """The product with activations in one step a token, or for all: their levels by the kernels, and the step last.

    With int8 on both sides each of a kernel's 16 partial sums is exact up to 16,640 columns, and so is the sum below
    2**24. Many rows take XLA's product of int8, whose sums are exact too.
    """
    stored = blocks_of(format)
    if x.shape[0] >= MANY and not stored and not group_of(format) and activations.startswith("int8"):
        return operation.body(x, *parts, out_dtype="float32", format=format, activations=activations)
    step = parts[-1:] if activations.endswith("_static") else ()
    levels, steps = round_tokens(x, activations, *step)
    weight = parts[: len(parts) - len(step)]
    if stored:
        return quantized_dot_blocks(levels, *weight, stored=stored) * steps
    codes, scale, *zero = weight
    if group_of(format):
        return quantized_dot_int4(levels, codes, scale, *zero) * steps
    return quantized_dot(levels, codes, jnp.ones_like(scale)) * (steps * scale)


def uncovered(
    x: jax.Array, *parts: jax.Array, out_dtype: str, format: str, activations: str | None = None
) -> str | None:
    """Says why no kernel computes `xlathe.ops.quantized_dot` of this; None where one does."""
    group = group_of(format)
    if group is None and not blocks_of(format) and not is_f16(format, activations):
        return f"expected {ON_CPU}; with activations as they are also float16 scales; found {format}"
    expected = "int8" if group == 0 else "uint8"
    if x.dtype != "float32" or parts[0].dtype != expected:
        return f"expected x float32 and codes {expected}; found {x.dtype} and {parts[0].dtype}"
    return None
