"""quantized_ragged_dot on CPU: the kernels of quantized_dot, run for the experts that have rows."""

import jax
import jax.numpy as jnp

from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot.cpu import GROUPS

TARGETS = {8: "xlathe.quantized_ragged_dot.int8", 4: "xlathe.quantized_ragged_dot.int4"}
"""By the bits of a code."""


def quantized_ragged_dot(
    x: jax.Array,  # float32 [m, k]
    sizes: jax.Array,  # int32 [experts]
    codes: jax.Array,  # int8 [experts, n, k] or uint8 [experts, n, k / 2]
    scale: jax.Array,  # float32 [experts, n] or bfloat16 [experts, n, k / group]
    *zero: jax.Array,  # uint8 like scale
    out_dtype: str,
    bits: int = 8,
    group: int | None = None,
    activations: str | None = None,
    isa: str = "auto",
) -> jax.Array:  # [m, n]
    """As the operation; of an expert without rows nothing is read.

    Raises OptionError for what `uncovered` tells, and XlatheError where the kernels were not built.
    """
    scheme = {"bits": bits, "group": group, "activations": activations}
    if reason := uncovered(x, sizes, codes, scale, *zero, out_dtype=out_dtype, **scheme):  # type: ignore[arg-type]
        raise OptionError(f"quantized_ragged_dot: {reason}")
    native.register()
    if bits == 4 and not zero:
        zero = (jnp.zeros((*codes.shape[:2], 0), jnp.uint8),)
    result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(TARGETS[bits], result)(x, sizes, codes, scale, *zero, isa=isa).astype(out_dtype)


def uncovered(
    x: jax.Array,
    sizes: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *zero: jax.Array,
    out_dtype: str,
    bits: int = 8,
    group: int | None = None,
    activations: str | None = None,
) -> str | None:
    """Says why no kernel computes `xlathe.ops.quantized_ragged_dot` of this; None where one does."""
    if activations is not None:
        return f"expected activations as they are; found them rounded to {activations}"
    if bits == 4 and group not in GROUPS:
        return f"expected a group of {', '.join(map(str, GROUPS))}; found {group}"
    count, n, k = codes.shape[0], codes.shape[1], x.shape[-1]
    expected = [("float32", (x.shape[0], k)), ("int32", (count,))]
    if bits == 8:
        expected += [("int8", (count, n, k)), ("float32", (count, n))]
    else:
        assert group is not None
        expected += [("uint8", (count, n, k // 2)), ("bfloat16", (count, n, k // group))]
        expected += [("uint8", (count, n, k // group))] * (len(zero) == 1)
    found = [(str(a.dtype), tuple(a.shape)) for a in (x, sizes, codes, scale, *zero)]
    return None if found == expected else f"expected {_texts(expected)}; found {_texts(found)}"


def _texts(types: list[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in types)
