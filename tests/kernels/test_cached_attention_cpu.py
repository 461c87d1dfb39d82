"""The CPU kernel of cached_attention against the reference body of the operation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.passes.decoding import difference, fused
from tests.variants import DECODERS
from xlathe.aot import units
from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.cached_attention.cpu import TARGET_F32, cached_attention
from xlathe.ops.cached_attention import cached_attention as operation
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.specialize import Specialize
from xlathe.program import compile, compile_unit

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without a C++ compiler")

ISAS = native.available_isas() if native.library() else ()
FUSED = tuple(isa for isa in ISAS if isa != "portable")  # multiply-adds rounded once
DTYPES = {f"{stage}_dtype": "float32" for stage in ("scores", "softmax", "probs", "out")}
ATTRIBUTES = {  # of the native kernel
    "scale": np.float32(1),
    "softcap": np.float32(0),
    "window": np.int64(0),
    "layout": "contiguous",
    "masked": False,
    "biased": False,
    "isa": "auto",
}
Operands = tuple[np.ndarray, ...]


def operands(
    n: int, r: int, s: int, k: int, g: int, d: int, e: int, *, seed: int = 0, dead: float = np.nan
) -> Operands:
    """q, keys, values, rows, positions of tokens in random rows; slots that no token sees hold `dead`.

    Every other token has one slot whose key is its query's needle, so that its softmax is peaked.
    """
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n, k, g, d), np.float32)
    keys, values = (rng.standard_normal((r, s, k, w), np.float32) for w in (d, e))
    rows, positions = rng.integers(0, r, n, dtype=np.int32), rng.integers(0, s, n, dtype=np.int32)
    for i in range(0, n, 2):
        keys[rows[i], rng.integers(0, positions[i] + 1)] = 4 * q[i, :, 0]
    for row in range(r):
        end = max(positions[rows == row], default=-1) + 1
        keys[row, end:], values[row, end:] = dead, dead
    return q, keys, values, rows, positions


def random_terms(args: Operands, *, heads: tuple[int, int], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A mask that always keeps a token's own slot, and a bias; [*heads, n, s]."""
    rng = np.random.default_rng(seed)
    shape = (*heads, args[0].shape[0], args[1].shape[1])
    mask = rng.random(shape) < 0.7
    mask |= np.arange(shape[3]) == args[4][:, None]
    return mask, rng.standard_normal(shape, np.float32)


def reference(
    args: Operands,
    *,
    scale: float = 0.3,
    softcap: float | None = None,
    window: int | None = None,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> jax.Array:
    terms = [jnp.asarray(term) for term in (mask, bias) if term is not None]
    return operation.body(
        *map(jnp.asarray, args),
        *terms,
        scale=scale,
        softcap=softcap,
        window=window,
        masked=mask is not None,
        biased=bias is not None,
        **DTYPES,
    )


def assert_close(args: Operands, isa: str = "auto", **options: Any) -> None:
    actual = cached_attention(*args, isa=isa, **{"scale": 0.3, **options})
    assert actual.dtype == np.float32
    assert difference(actual, reference(args, **options)) <= 1e-5


SIZES = {
    "grouped": (8, 3, 70, 2, 3, 32, 32),
    "one kv head": (5, 2, 40, 1, 11, 16, 16),
    "no groups": (4, 2, 130, 4, 1, 64, 64),
    "one token": (1, 1, 512, 4, 2, 64, 64),
    "odd widths": (8, 3, 100, 2, 2, 7, 45),
    "width one": (3, 2, 17, 1, 1, 1, 1),
    "prefill": (40, 2, 200, 2, 4, 48, 80),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_close_to_the_reference(sizes: tuple[int, ...], isa: str) -> None:
    assert_close(operands(*sizes), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 7}, {"window": 4000}, {"softcap": 2.0}, {"softcap": 50.0}]
)
def test_windows_and_soft_caps(options: dict[str, Any], isa: str) -> None:
    for name in ("grouped", "odd widths"):
        assert_close(operands(*SIZES[name]), isa, **options)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_mask_and_bias_broadcast_over_heads(heads: tuple[int, int]) -> None:
    args = operands(*SIZES["grouped"])
    mask, bias = random_terms(args, heads=heads)
    assert_close(args, mask=mask)
    assert_close(args, bias=bias)
    assert_close(args, mask=mask, bias=bias, window=20, softcap=5.0)


def test_large_scores_are_exact_choices() -> None:
    """Scores up to thousands, of whole numbers so that both sums are exact: no overflow, and ties are shared."""
    q, keys, *others = operands(*SIZES["grouped"])
    assert_close((q.round(), keys.round(), *others), scale=64.0)


@pytest.mark.parametrize("isa", ISAS)
def test_other_slots_are_never_read(isa: str) -> None:
    """The same bits, whatever lies behind the position, in front of the window and in other rows."""
    q, keys, values, rows, positions = operands(*SIZES["grouped"], dead=0.0)
    expected = cached_attention(q, keys, values, rows, positions, scale=0.3, window=9, isa=isa)
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        mine = slice(max(0, position - 8), position + 1)
        alone = [np.full_like(cache, np.nan) for cache in (keys, values)]
        for cache, filled in zip(alone, (keys, values), strict=True):
            cache[row, mine] = filled[row, mine]
        token = slice(i, i + 1)
        actual = cached_attention(q[token], *alone, rows[token], positions[token], scale=0.3, window=9, isa=isa)
        np.testing.assert_array_equal(actual, expected[token])


def test_nan_that_is_seen_shows() -> None:
    args = operands(*SIZES["grouped"])
    args[1][args[3][2], args[4][2]] = np.nan
    assert np.isnan(cached_attention(*args, scale=0.3)[2]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["grouped", "odd widths", "prefill"])
def test_same_bits_alone_and_among_others(name: str, isa: str) -> None:
    args = operands(*SIZES[name])
    together = cached_attention(*args, scale=0.3, window=90, isa=isa)
    for i in range(len(together)):
        token = slice(i, i + 1)
        alone = cached_attention(
            args[0][token], *args[1:3], args[3][token], args[4][token], scale=0.3, window=90, isa=isa
        )
        np.testing.assert_array_equal(alone, together[token])


def test_instruction_sets_agree() -> None:
    args = operands(*SIZES["odd widths"])
    found = {isa: cached_attention(*args, scale=0.3, softcap=5.0, isa=isa) for isa in ISAS}
    for isa in FUSED:
        np.testing.assert_array_equal(found[isa], found[FUSED[0]])
        assert difference(found["portable"], found[isa]) <= 1e-6


def test_rows_and_positions_outside_the_cache() -> None:
    """Padding gets zeros and a position past the end sees the last slots; the others keep their values."""
    q, keys, values, rows, positions = operands(8, 3, 70, 2, 3, 32, 32, dead=0.0)
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    rows[:4], positions[:4] = [3, -1, low, high], 5
    positions[4:7] = [-1, low, high]
    actual = np.asarray(cached_attention(q, keys, values, rows, positions, scale=0.3))
    assert not actual[:6].any()
    kept = slice(6, 8)
    expected = reference((q[kept], keys, values, rows[kept], np.minimum(positions[kept], 69)))
    assert difference(actual[kept], expected) <= 1e-5
    assert not np.asarray(cached_attention(q, keys, values, rows, positions, scale=0.3, window=7))[:7].any()


@pytest.mark.parametrize("axis", range(7))
def test_empty_sizes(axis: int) -> None:
    sizes = [2, 2, 5, 2, 2, 4, 4]
    sizes[axis] = 0
    n, r, s, k, g, d, e = sizes
    args = [np.ones(shape, np.float32) for shape in ((n, k, g, d), (r, s, k, d), (r, s, k, e))]
    zeros = np.zeros(n, np.int32)
    actual = cached_attention(*args, zeros, zeros, scale=1.0)
    np.testing.assert_array_equal(actual, np.full((n, k, g, e), float(r > 0 and s > 0), np.float32))


def test_inside_a_while_loop_with_its_writes() -> None:
    """A decode loop: each step writes its token's key and value and attends to all before it."""
    q, keys, values, rows, _ = operands(2, 2, 24, 2, 2, 16, 16, dead=0.0)
    rows = np.arange(2, dtype=np.int32)

    def run(attend: Any) -> jax.Array:
        def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
            i, q, keys, values = state
            at = jnp.full(2, i, jnp.int32)
            keys, values = (c.at[rows, at].set(q[:, :, 0]) for c in (keys, values))
            return i + 1, jnp.tanh(attend((q, keys, values, rows, at))), keys, values

        first = (0, jnp.asarray(q), jnp.full_like(keys, jnp.nan), jnp.full_like(values, jnp.nan))
        return jax.jit(lambda: jax.lax.while_loop(lambda state: state[0] < 24, step, first)[1])()

    assert difference(run(lambda args: cached_attention(*args, scale=0.3)), run(reference)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "window_7"])
def test_a_compiled_program_generates_the_same_tokens_without_kernels(name: str) -> None:
    (variant,) = (v for v in DECODERS if v.name == name)
    step = KVCache()(fused(variant))
    lowered = LowerKernels()(Specialize(tokens=4, selected=1, rows=1, slots=24)(step))
    assert lowered.history[-1].hits["cached_attention: kernel"] == variant.layers
    program = compile(step, max_len=24, unit=4, chunks=(8,))
    plain = units(step, program.buckets, "cpu", kernels=False)
    calls = {u.signature.name: compile_unit(u.function, u.signature.avals) for u in plain}
    prompt = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
    (with_kernels,) = program.generate(prompt, max_tokens=12)
    (without,) = dataclasses.replace(program, calls=calls).generate(prompt, max_tokens=12)
    assert len(with_kernels.tokens) == 12
    assert with_kernels.tokens == without.tokens


GOOD = operands(2, 2, 5, 2, 3, 8, 4, dead=0.0)


def changed(index: int, array: np.ndarray) -> Operands:
    return (*GOOD[:index], array, *GOOD[index + 1 :])


@pytest.mark.parametrize(
    ("args", "options", "found"),
    [
        (changed(0, GOOD[0][..., :7]), {}, r"found q float32\[2, 2, 3, 7\]"),
        (changed(1, GOOD[1].astype(np.float16)), {}, r"keys float16\[2, 5, 2, 8\]"),
        (changed(2, GOOD[2][:, :4]), {}, r"values float32\[2, 4, 2, 4\]"),
        (changed(3, GOOD[3][:1]), {}, r"rows int32\[1\]"),
        (changed(4, GOOD[4].astype(np.uint32)), {}, r"positions uint32\[2\]"),
        (GOOD, {"mask": np.ones((2, 2, 2, 5), bool)}, r"mask bool\[2, 2, 2, 5\]"),
        (GOOD, {"bias": np.ones((1, 1, 1, 5), np.float32)}, r"bias float32\[1, 1, 1, 5\]"),
        (GOOD, {"window": 0}, "found None and 0"),
        (GOOD, {"softcap": -1.0}, "found -1.0 and None"),
    ],
)
def test_refused_operands(args: Operands, options: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        cached_attention(*args, scale=1.0, **options)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (changed(0, GOOD[0][..., :7]), {}, r"found q \[2, 2, 3, 7\], keys \[2, 5, 2, 8\]"),
        (changed(1, GOOD[1][:1]), {}, r"keys \[1, 5, 2, 8\]"),
        (changed(3, GOOD[3][:1]), {}, r"rows \[1\]"),
        (changed(2, GOOD[2].astype(np.float16)), {}, "expected F32 but got F16"),
        (GOOD, {"masked": True}, "expected terms"),
        ((*GOOD, np.ones((1, 1, 2, 5), np.float32)), {"masked": True}, "expected terms"),
        ((*GOOD, np.ones((1, 1, 1, 5), np.float32)), {"biased": True}, "expected terms"),
        ((*GOOD, np.ones((1, 1, 2, 5), np.float32)), {}, "expected terms"),
        (GOOD, {"window": np.int64(-3)}, "expected a window of at least 1, or 0 for none; found -3"),
        (GOOD, {"isa": "sse9"}, 'cannot run isa "sse9"'),
    ],
)
def test_native_code_refuses_operands_by_itself(args: Operands, options: dict[str, Any], message: str) -> None:
    """As a damaged or foreign program might call it, past the checks in Python."""
    native.register()
    call = jax.ffi.ffi_call(TARGET_F32, jax.ShapeDtypeStruct((2, 2, 3, 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*args, **(ATTRIBUTES | options))
