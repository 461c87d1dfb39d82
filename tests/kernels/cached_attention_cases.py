"""The kernels of cached_attention that cover the same inputs, beside the reference body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.attention_cases import assert_as_good, options_of
from tests.kernels.test_cached_attention_cpu import operands
from xlathe.ops.cached_attention import cached_attention as operation

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


def check(kernel: Kernel, case: tuple[tuple[int, ...], int | None, float | None], dtype: str) -> None:
    sizes, window, softcap = case
    assert_as_good(kernel, operation.body, tokens(sizes, dtype), options(dtype, window, softcap))


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
]
GOOD = {
    "q": "bfloat16 2 2 3 64",
    "keys": "bfloat16 2 64 2 64",
    "values": "bfloat16 2 64 2 64",
    "rows": "int32 2",
    "positions": "int32 2",
}
