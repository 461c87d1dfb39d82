"""The kernels of cached_attention that cover the same inputs, beside the reference body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.attention_cases import assert_as_good, options_of
from tests.kernels.test_cached_attention_cpu import operands
from xlathe.ops.cached_attention import cached_attention as operation
from xlathe.ops.write_slots import quantize_heads

Kernel = Callable[..., jax.Array]

# n, r, s, k, g, d, e; window; softcap
CASES = {
    "decode": ((4, 4, 70, 2, 3, 64, 64), None, None),
    "one row": ((1, 1, 300, 2, 1, 128, 128), None, 50.0),
    "mixed rows and a window": ((40, 3, 600, 2, 2, 64, 128), 100, None),
    "a window of one slot": ((20, 2, 130, 1, 8, 128, 64), 1, 5.0),
}


def tokens(sizes: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    """Operands in random rows at random positions; slots that no token sees hold NaN."""
    q, keys, values, rows, positions = operands(*sizes)
    return (*(jnp.asarray(x, dtype) for x in (q, keys, values)), jnp.asarray(rows), jnp.asarray(positions))


def options(dtype: str, window: int | None = None, softcap: float | None = None) -> dict[str, Any]:
    return options_of(dtype, None, softcap) | {"window": window}


def kept(function: Kernel, *, page: int | None = None, quantized: bool = False) -> Kernel:
    """The kernel or the body over another layout of the contiguous cache that the result is called with."""

    def over(
        q: jax.Array, keys: jax.Array, values: jax.Array, rows: jax.Array, positions: jax.Array, **options: Any
    ) -> jax.Array:
        arrays, table = [keys, values], []
        if quantized:
            (arrays[0], of_keys), (arrays[1], of_values) = quantize_heads(keys), quantize_heads(values)
            arrays += [of_keys, of_values]
            options["quantized"] = True
        if page is not None:
            arrays, table = in_pages(arrays, page)
            options["layout"] = "paged"
        return function(q, *arrays[:2], rows, positions, *arrays[2:], *table, **options)

    return over


def in_pages(arrays: list[jax.Array], page: int, *, seed: int = 0) -> tuple[list[jax.Array], list[jax.Array]]:
    """Puts [r, s, ...] into pages that lie about in a pool, with others of NaN between; and their table.

    Pages of NaN alone are left out: entry -1, or one past the end of the pool.
    """
    rng = np.random.default_rng(seed)
    r, s = arrays[0].shape[:2]
    pages = -(-s // page)
    place = rng.permutation(2 * r * pages)[: r * pages].reshape(r, pages)
    table = place.copy()
    pools = []
    for array in arrays:
        dead = 99 if array.dtype == jnp.int8 else np.nan
        padded = np.full((r, pages * page, *array.shape[2:]), dead, array.dtype)
        padded[:, :s] = array
        pool = np.full((2 * r * pages, page, *array.shape[2:]), dead, array.dtype)
        pool[place] = padded.reshape(r, pages, page, *array.shape[2:])
        pools.append(pool)
    held = pools[-1][place].astype(np.float32)  # [r, pages, page, ...]
    for row, entry in np.argwhere(np.isnan(held).all(axis=tuple(range(2, held.ndim)))):
        table[row, entry] = -1 if entry % 2 else len(pools[-1])
    return [jnp.asarray(pool) for pool in pools], [jnp.asarray(table, jnp.int32)]


def check(
    kernel: Kernel, case: tuple[tuple[int, ...], int | None, float | None], dtype: str, *, body: Kernel = operation.body
) -> None:
    sizes, window, softcap = case
    assert_as_good(kernel, body, tokens(sizes, dtype), options(dtype, window, softcap))


def check_only_seen_slots_count(kernel: Kernel, dtype: str) -> None:
    """NaN behind the position, in front of the window and in other rows changes no bit."""
    q, keys, values, rows, positions = (np.asarray(x) for x in tokens((6, 2, 192, 1, 2, 64, 64), dtype))
    keys, values = (np.nan_to_num(x.astype(np.float32)).astype(x.dtype) for x in (keys, values))
    expected = kernel(*map(jnp.asarray, (q, keys, values, rows, positions)), **options(dtype, 9))
    alone = [np.full_like(x, np.nan) for x in (keys, values)]
    for row, position in zip(rows, positions, strict=True):
        mine = slice(max(0, position - 8), position + 1)
        for cache, filled in zip(alone, (keys, values), strict=True):
            cache[row, mine] = filled[row, mine]
    actual = kernel(*map(jnp.asarray, (q, *alone, rows, positions)), **options(dtype, 9))
    np.testing.assert_array_equal(actual, expected)
    assert np.isfinite(actual.astype(np.float32)).all()


def check_same_bits_in_any_company(kernel: Kernel, dtype: str) -> None:
    """A token's result does not depend on what the others of its tile see."""
    q, keys, values, rows, positions = tokens((6, 2, 256, 1, 2, 64, 64), dtype)
    keys, values = (jnp.nan_to_num(x) for x in (keys, values))
    together = kernel(q, keys, values, rows, positions, **options(dtype))
    others = positions.at[1:].set(jnp.array([255, 3, 100, 64, 9]))
    np.testing.assert_array_equal(kernel(q, keys, values, rows, others, **options(dtype))[0], together[0])


def check_padding(kernel: Kernel, dtype: str) -> None:
    """Tokens outside the cache get zeros; one past the end of its row sees all of it; the others keep their values."""
    q, keys, values, rows, positions = tokens((6, 2, 128, 1, 2, 64, 64), dtype)
    keys, values = (jnp.nan_to_num(x) for x in (keys, values))
    rows, positions = rows.at[:2].set(jnp.array([2, -1])), positions.at[2:4].set(jnp.array([-1, 1000]))
    actual = kernel(q, keys, values, rows, positions, **options(dtype))
    assert not actual[:3].any()
    kept = (q[3:], keys, values, rows[3:], positions[3:])
    np.testing.assert_array_equal(actual[3:], kernel(*kept, **options(dtype)))
    assert_as_good(kernel, operation.body, kept, options(dtype))


def check_a_page_that_is_missing(kernel: Kernel, dtype: str, page: int) -> None:
    """Slots of an entry that is no page of the pool are not seen, and their row's others still are."""
    q, keys, values, rows, positions = tokens((12, 2, 192, 1, 2, 64, 64), dtype)
    pools, (table,) = in_pages([jnp.nan_to_num(keys), jnp.nan_to_num(values)], page)
    table = table.at[0, 0].set(-1).at[1, 1].set(len(pools[0]))
    args = (q, *pools, rows, jnp.maximum(positions, 2 * page), table)
    assert_as_good(kernel, operation.body, args, options(dtype) | {"layout": "paged"})


def serving(
    sizes: tuple[int, int, int], head: int, page: int | None = None, quantized: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """Operands of n tokens, k heads and g queries each over 8 rows of 2048 slots, as texts for `avals`; and options."""
    n, k, g = sizes
    slots = "8 2048" if page is None else f"{8 * -(-2048 // page)} {page}"
    kept = [f"{'int8' if quantized else 'bfloat16'} {slots} {k} {head}"] * 2
    more = [f"float32 {slots} {k}"] * 2 * quantized + [f"int32 8 {-(-2048 // page)}" for page in [page] if page]
    layout = {"layout": "paged" if page else "contiguous", "quantized": quantized}
    places = [f"int32 {n}"] * 2
    return [f"bfloat16 {n} {k} {g} {head}", *kept, *places, *more], options("bfloat16", 512, 50.0) | layout


SIZES = {"decode of 8 rows": (8, 8, 4), "decode of 8 rows, 7 heads a key": (8, 2, 7), "512 new tokens": (512, 8, 4)}
REFUSED = [
    ({"q": "bfloat16 2 2 3 80", "keys": "bfloat16 2 64 2 80"}, {}, "features; found 80 and 64"),
    ({"keys": "bfloat16 2 64 3 64"}, {}, r"found \(2, 2, 3, 64\) and \(2, 64, 3, 64\)"),
    ({"values": "bfloat16 2 4 2 64"}, {}, r"expected keys .* and values .*\(2, 4, 2, 64\)"),
    ({"values": "float32 2 64 2 64"}, {}, "found bfloat16, float32"),
    ({"rows": "int32 1"}, {}, r"found int32\[1\], int32\[2\]"),
    ({"positions": "uint32 2"}, {}, r"found int32\[2\], uint32\[2\]"),
    ({}, {"masked": True}, "no mask beside the window"),
    ({}, {"biased": True}, "no mask beside the window, and no bias"),
    ({}, {"probs_dtype": "float32"}, "found bfloat16, float32"),
    ({"keys": "bfloat16 2 0 2 64", "values": "bfloat16 2 0 2 64"}, {}, "no axis to be empty"),
    ({}, {"layout": "ring"}, "found a ring"),
    ({}, {"shared": 32}, "expected values of their own"),
    ({}, {"layout": "paged"}, "no mask beside the window, and no bias"),
    ({"table": "int32 2"}, {"layout": "paged"}, r"expected a table int32 \[r, c\]; found int32\[2\]"),
    ({"table": "uint32 2 4"}, {"layout": "paged"}, r"found uint32\[2, 4\]"),
    ({"table": "int32 0 4"}, {"layout": "paged"}, "no axis to be empty"),
    ({"scales": "float32 2 64 2", "more": "float32 2 64 2"}, {"quantized": True}, "expected codes int8 .* bfloat16"),
    ({"scales": "float32 2 64 2", "more": "float32 2 64 1"}, {"quantized": True}, r"scales float32 \[r, s, k\]"),
]
GOOD = {
    "q": "bfloat16 2 2 3 64",
    "keys": "bfloat16 2 64 2 64",
    "values": "bfloat16 2 64 2 64",
    "rows": "int32 2",
    "positions": "int32 2",
}
