"""cached_attention on CPU, by the kernel in cpu.cc through the XLA FFI."""

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.kernels import native

TARGET_F32 = "xlathe.cached_attention.f32"
TARGET_INT8 = "xlathe.cached_attention.int8"
LAYOUTS = ("contiguous", "ring", "paged")


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    table: jax.Array | None = None,
    layout: str = "contiguous",
    shared: int | None = None,
    isa: str = "auto",
) -> jax.Array:
    """`xlathe.ops.cached_attention` in float32, reading only the slots that each token sees.

    A token's result has the same bits whatever the other tokens, the number of threads, and the layout. A token that
    sees no slot, as padding in a row that the cache lacks, gets zeros; in the reference body it gets the mean of what
    the others see. Neither is used.

    Args:
      q: float32 [n, k, g, d].
      keys: float32 or int8 [r, s, k, d]; paged [p, page, k, d].
      values: float32 or int8 [r, s, k, e]; paged [p, page, k, e].
      rows: int32 [n].
      positions: int32 [n].
      scale: factor of the products.
      softcap: bound of the scaled products, c tanh(x / c); None for none.
      window: how many slots a token sees at most, its own included; None for all.
      mask: bool [k | 1, g | 1, n, s], False where a seen slot counts for nothing.
      bias: float32 [k | 1, g | 1, n, s], added to the scores.
      scales: of int8 keys and of int8 values, float32 [r, s, k]; paged [p, page, k].
      table: where paged, int32 [r, c] with s = c * page: which page of the pool holds a row's slots from i * page on.
      layout: `contiguous`, `paged`, or `ring`, which has no mask and no bias.
      shared: values are the first so many features of the operand, as where a latent is key and value; None for all.
      isa: instruction set; "auto" is the best of the CPU that runs the program. Others are for tests.

    Returns:
      float32 [n, k, g, e], or [n, k, g, shared].

    Raises:
      OptionError: a shape or dtype differs from the above, or window or softcap is not positive.
      XlatheError: the kernels were not built.
    """
    operands = {"q": q, "keys": keys, "values": values, "rows": rows, "positions": positions}
    key_scales, value_scales = (None, None) if scales is None else scales
    more = {"mask": mask, "bias": bias, "key scales": key_scales, "value scales": value_scales, "table": table}
    given = {name: array for name, array in more.items() if array is not None}  # in the order of the native kernel
    _check_options(softcap, window, layout, given)
    _check(operands | given, layout)
    width = values.shape[3] if shared is None else shared
    if not 0 <= width <= values.shape[3]:
        raise OptionError(f"cached_attention: expected shared up to {values.shape[3]} features; found {shared}")
    native.register()
    result = jax.ShapeDtypeStruct((*q.shape[:3], width), jnp.float32)
    return jax.ffi.ffi_call(TARGET_F32 if scales is None else TARGET_INT8, result)(
        *operands.values(),
        *given.values(),
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(window or 0),
        layout=layout,
        masked=mask is not None,
        biased=bias is not None,
        isa=isa,
    )


def _check_options(softcap: float | None, window: int | None, layout: str, given: dict[str, jax.Array]) -> None:
    if not (softcap is None or softcap > 0) or not (window is None or window > 0):
        raise OptionError(
            f"cached_attention: expected softcap and window above 0 or None; found {softcap} and {window}"
        )
    terms = [name for name in ("mask", "bias") if name in given]
    if layout not in LAYOUTS or ("table" in given) != (layout == "paged") or (layout == "ring" and terms):
        raise OptionError(
            "cached_attention: expected a layout contiguous, paged with a table, or ring without mask and bias; "
            f"found {layout} with {', '.join([*terms, *(['table'] if 'table' in given else [])]) or 'none of them'}"
        )


def _check(arrays: dict[str, jax.Array], layout: str) -> None:
    expected = {name: aval for name, aval in _avals(layout, "key scales" in arrays).items() if name in arrays}
    sizes: dict[str, int] = {}
    if all(_fits(arrays[name], aval, sizes) for name, aval in expected.items()):
        return
    wanted = ", ".join(f"{name} {aval}" for name, aval in expected.items())
    found = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in arrays.items())
    raise OptionError(f"cached_attention: expected {wanted}; found {found}")


def _avals(layout: str, codes: bool) -> dict[str, str]:
    """Returns what each array has to be, with those first whose sizes the others depend on."""
    kept, slots = "int8" if codes else "float32", "p, page" if layout == "paged" else "r, s"
    return {
        "q": "float32 [n, k, g, d]",
        "keys": f"{kept} [{slots}, k, d]",
        "values": f"{kept} [{slots}, k, e]",
        "rows": "int32 [n]",
        "positions": "int32 [n]",
        "table": "int32 [r, c]",
        "key scales": f"float32 [{slots}, k]",
        "value scales": f"float32 [{slots}, k]",
        "mask": f"bool [k | 1, g | 1, n, {'c * page' if layout == 'paged' else 's'}]",
        "bias": f"float32 [k | 1, g | 1, n, {'c * page' if layout == 'paged' else 's'}]",
    }


def _fits(array: jax.Array, aval: str, sizes: dict[str, int]) -> bool:
    """Compares with axes such as `[k | 1, n]`; sizes: of the names met so far, which new ones join."""
    dtype, axes = aval.split(" ", 1)
    names = [axis.split(" | ") for axis in axes.strip("[]").split(", ")]
    if array.dtype != dtype or array.ndim != len(names):
        return False
    for (name, *one), size in zip(names, array.shape, strict=True):
        known = sizes["c"] * sizes["page"] if name == "c * page" else sizes.setdefault(name, size)
        if size != known and not (one and size == 1):
            return False
    return True
