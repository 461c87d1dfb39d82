"""What the Pallas kernels of quantized_dot cover."""

from collections.abc import Iterable

import jax

from xlathe.storage import Blocks, Part, Scaled, parse_format

GROUPS = (32, 64, 128, 256, 512, 1024)
"""Codes of 4 bits that may share a scale."""
MIDDLE = 8
"""The zero point of symmetric 4-bit codes."""
BLOCKS = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")
"""Blocks of GGUF files that kernels for CPUs read."""
COVERED = f"int8:channel, and int4 in groups of {', '.join(map(str, GROUPS))} with scales in bfloat16"


def group_of(format: str) -> int | None:
    """Returns the codes that share a scale in a format that kernels cover: 0 for int8 by channel; None of others."""
    stored = parse_format(format)
    if not isinstance(stored, Scaled) or stored.rows != 1:
        return None
    if (stored.element, stored.columns, stored.scale, stored.zero) == ("int8", 0, "f32", ""):
        return 0
    fits = stored.element == "int4" and stored.columns in GROUPS
    return stored.columns if fits and stored.scale == "bf16" and stored.zero in ("", "u8") else None


def blocks_of(format: str) -> Blocks | None:
    """Returns the format where it is of blocks that kernels for CPUs read; None of others."""
    stored = parse_format(format)
    return stored if isinstance(stored, Blocks) and stored.name in BLOCKS else None


def uncovered(
    x: jax.Array,
    *parts: jax.Array,
    out_dtype: str,
    format: str,
    activations: str | None = None,
) -> str | None:
    """Says why no kernel computes `xlathe.ops.quantized_dot` of this; None where one may."""
    if activations is not None:
        return f"expected activations as they are; found them rounded to {activations}"
    group = group_of(format)
    if group is None:
        return f"expected {COVERED}; found {format}"
    if out_dtype not in ("bfloat16", "float32"):
        return f"expected a result in bfloat16 or float32; found {out_dtype}"
    found = types_of(parts)
    told = texts([*types_of([x]), *found])
    if x.ndim < 1 or not all(array.size for array in (x, *parts)):
        return f"expected no axis to be empty; found {told}"
    n, k = parts[0].shape[0], x.shape[-1]
    form = "codes int8 [n, k], scale float32 [n]"
    if group:
        form = f"codes uint8 [n, k / 2], scale bfloat16 [n, k / {group}] and zero uint8 like it, or none"
    stored = parse_format(format)
    if stored.misfit(n, k) or found != types_of(stored.parts(n, k).values()) or x.dtype != "bfloat16":
        return f"expected x bfloat16 [..., k], {form}; found {told}"
    return None


def types_of(arrays: Iterable[jax.Array | Part]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of arrays, or of what a format stores."""
    return [(str(array.dtype), tuple(array.shape)) for array in arrays]


def texts(types: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in types)
