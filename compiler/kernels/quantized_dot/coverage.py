"""What the Pallas kernels of quantized_dot cover."""

import jax

GROUPS = (32, 64, 128, 256, 512, 1024)
"""Codes of 4 bits that may share a scale."""


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
    if activations is not None:
        return f"expected activations as they are; found them rounded to {activations}"
    if not (bits == 8 and group is None) and not (bits == 4 and group in GROUPS):
        groups = ", ".join(map(str, GROUPS))
        return f"expected codes of 8 bits, or of 4 in groups of {groups}; found {bits} bits, group {group}"
    if out_dtype not in ("bfloat16", "float32"):
        return f"expected a result in bfloat16 or float32; found {out_dtype}"
    operands = [x, codes, scale, *zero]
    if x.ndim < 1 or not all(array.size for array in operands):
        return f"expected no axis to be empty; found {_texts(operands)}"
    n, k = codes.shape[0], x.shape[-1]
    expected: list[tuple[str, tuple[float, ...]]]
    if group is None:
        form = "codes int8 [n, k], scale float32 [n]"
        expected = [("int8", (n, k)), ("float32", (n,))]
    else:
        form = f"codes uint8 [n, k / 2], scale bfloat16 [n, k / {group}] and zero uint8 like it, or none"
        expected = [("uint8", (n, k / 2)), ("bfloat16", (n, k / group))]
        expected += [("uint8", (n, k / group))] * (len(zero) == 1)
    if [(str(array.dtype), array.shape) for array in operands[1:]] != expected or x.dtype != "bfloat16":
        return f"expected x bfloat16 [..., k], {form}; found {_texts(operands)}"
    return None


def _texts(operands: list[jax.Array]) -> str:
    return ", ".join(f"{array.dtype}{list(array.shape)}" for array in operands)
