"""cached_attention on CPU, by the kernel in cpu.cc through the XLA FFI."""

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.kernels import native

TARGET_F32 = "xlathe.cached_attention.f32"


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
    isa: str = "auto",
) -> jax.Array:
    """`xlathe.ops.cached_attention` in float32, reading only the slots that each token sees.

    A token's result has the same bits whatever the other tokens or the number of threads. A token that sees no
    slot, as padding in a row that the cache lacks, gets zeros; in the reference body it gets the mean of what
    the others see. Neither is used.

    Args:
      q: float32 [n, k, g, d].
      keys: float32 [r, s, k, d].
      values: float32 [r, s, k, e].
      rows: int32 [n].
      positions: int32 [n].
      scale: factor of the products.
      softcap: bound of the scaled products, c tanh(x / c); None for none.
      window: how many slots a token sees at most, its own included; None for all.
      mask: bool [k | 1, g | 1, n, s], False where a seen slot counts for nothing.
      bias: float32 [k | 1, g | 1, n, s], added to the scores.
      isa: instruction set; "auto" is the best of the CPU that runs the program. Others are for tests.

    Returns:
      float32 [n, k, g, e].

    Raises:
      OptionError: a shape or dtype differs from the above, or window or softcap is not positive.
      XlatheError: the kernels were not built.
    """
    operands = {"q": q, "keys": keys, "values": values, "rows": rows, "positions": positions}
    terms = {name: term for name, term in (("mask", mask), ("bias", bias)) if term is not None}
    _check(operands | terms, softcap, window)
    native.register()
    result = jax.ShapeDtypeStruct((*q.shape[:3], values.shape[3]), jnp.float32)
    return jax.ffi.ffi_call(TARGET_F32, result)(
        *operands.values(),
        *terms.values(),
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(window or 0),
        masked=mask is not None,
        biased=bias is not None,
        isa=isa,
    )


_AXES = {
    "q": "float32 [n, k, g, d]",
    "keys": "float32 [r, s, k, d]",
    "values": "float32 [r, s, k, e]",
    "rows": "int32 [n]",
    "positions": "int32 [n]",
    "mask": "bool [k | 1, g | 1, n, s]",
    "bias": "float32 [k | 1, g | 1, n, s]",
}


def _check(arrays: dict[str, jax.Array], softcap: float | None, window: int | None) -> None:
    if not (softcap is None or softcap > 0) or not (window is None or window > 0):
        raise OptionError(
            f"cached_attention: expected softcap and window above 0 or None; found {softcap} and {window}"
        )
    sizes: dict[str, int] = {}
    if all(_fits(array, _AXES[name], sizes) for name, array in arrays.items()):
        return
    expected = ", ".join(f"{name} {_AXES[name]}" for name in arrays)
    found = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in arrays.items())
    raise OptionError(f"cached_attention: expected {expected}; found {found}")


def _fits(array: jax.Array, aval: str, sizes: dict[str, int]) -> bool:
    """Compares with axes such as `[k | 1, n]`; sizes: of the letters met so far, which new ones join."""
    dtype, axes = aval.split(" ", 1)
    names = [axis.split(" | ") for axis in axes.strip("[]").split(", ")]
    return (
        array.dtype == dtype
        and array.ndim == len(names)
        and all(
            size == sizes.setdefault(letter, size) or (size == 1 and bool(one))
            for (letter, *one), size in zip(names, array.shape, strict=True)
        )
    )
