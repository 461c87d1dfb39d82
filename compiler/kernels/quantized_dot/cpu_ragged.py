"""quantized_ragged_dot on CPU: the kernels of quantized_dot, run for the experts that have rows."""

import jax
import jax.numpy as jnp

from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot.coverage import blocks_of, group_of, texts, types_of
from xlathe.kernels.quantized_dot.cpu import ON_CPU
from xlathe.storage import parse_format

TARGETS = {8: "xlathe.quantized_ragged_dot.int8", 4: "xlathe.quantized_ragged_dot.int4"}
"""By the bits of a code."""
TARGET_BLOCKS = "xlathe.quantized_ragged_dot.blocks"


def quantized_ragged_dot(
    x: jax.Array,  # float32 [m, k]
    sizes: jax.Array,  # int32 [experts]
    *parts: jax.Array,  # codes int8 [experts, n, k] or uint8 [experts, n, k / 2]; scale float32 [experts, n] or
    # bfloat16 [experts, n, k / group]; zero uint8 like scale; or blocks uint8 [experts, n, bytes of k]
    out_dtype: str,
    format: str,
    activations: str | None = None,
    isa: str = "auto",
) -> jax.Array:  # [m, n]
    """As the operation; of an expert without rows nothing is read.

    Raises OptionError for what `uncovered` tells, and XlatheError where the kernels were not built.
    """
    if reason := uncovered(x, sizes, *parts, out_dtype=out_dtype, format=format, activations=activations):
        raise OptionError(f"quantized_ragged_dot: {reason}")
    native.register()
    result = jax.ShapeDtypeStruct((x.shape[0], parts[0].shape[1]), jnp.float32)
    if stored := blocks_of(format):
        call = jax.ffi.ffi_call(TARGET_BLOCKS, result)
        return call(x, sizes, *parts, type=stored.layout.name, activations=activations or "", isa=isa).astype(out_dtype)
    bits, (codes, scale, *zero) = 4 if group_of(format) else 8, parts
    if bits == 4 and not zero:
        zero = [jnp.zeros((*codes.shape[:2], 0), jnp.uint8)]
    return jax.ffi.ffi_call(TARGETS[bits], result)(x, sizes, codes, scale, *zero, isa=isa).astype(out_dtype)


def uncovered(
    x: jax.Array,
    sizes: jax.Array,
    *parts: jax.Array,
    out_dtype: str,
    format: str,
    activations: str | None = None,
) -> str | None:
    """Says why no kernel computes `xlathe.ops.quantized_ragged_dot` of this; None where one does."""
    blocks = blocks_of(format)
    if activations is not None and not (blocks and activations == "int8"):
        return f"expected activations as they are; found them rounded to {activations}"
    if group_of(format) is None and not blocks:
        return f"expected {ON_CPU}; found {format}"
    count, n, k = *parts[0].shape[:2], x.shape[-1]
    stored = parse_format(format)
    if reason := stored.misfit(n, k):
        return reason
    each = [(dtype, (count, *shape)) for dtype, shape in types_of(stored.parts(n, k).values())]
    expected = [("float32", (x.shape[0], k)), ("int32", (count,)), *each]
    found = types_of((x, sizes, *parts))
    return None if found == expected else f"expected {texts(expected)}; found {texts(found)}"
