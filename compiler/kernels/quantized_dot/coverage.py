"""What the Pallas kernels of quantized_dot cover."""

import jax


def uncovered(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *zero: jax.Array,
    out_dtype: str,
    bits: int = 8,
    group: int | None = None,
    activations: str | None = None,
) -> str | None:
    """Says why no kernel computes `xlathe.ops.quantized_dot` of this; None where one may."""
    if (bits, group, activations, zero) != (8, None, None, ()):
        return f"expected 8 bits a code, one scale a row and activations as they are; found {bits} bits, group {group}"
    if x.dtype != "bfloat16" or codes.dtype != "int8" or scale.dtype != "float32":
        return f"expected x bfloat16, codes int8, scale float32; found {x.dtype}, {codes.dtype}, {scale.dtype}"
    if out_dtype not in ("bfloat16", "float32"):
        return f"expected a result in bfloat16 or float32; found {out_dtype}"
    if codes.ndim != 2 or x.ndim < 1 or x.shape[-1] != codes.shape[1] or scale.shape != codes.shape[:1]:
        return f"expected x [..., k], codes [n, k], scale [n]; found {x.shape}, {codes.shape}, {scale.shape}"
    if not (x.size and codes.size):
        return f"expected no axis to be empty; found {x.shape}, {codes.shape}"
    return None
