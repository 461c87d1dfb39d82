"""The CPU kernel of quantized_dot against NumPy in float64."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot import cpu
from xlathe.kernels.quantized_dot.cpu import TARGET_INT8, quantized_dot
from xlathe.ops.quantized_dot import quantized_dot as operation
from xlathe.storage import parse_format

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]

needs_library = pytest.mark.skipif(native.library() is None, reason="built without a C++ compiler")
ISAS = native.available_isas() if native.library() else ()
FUSED = tuple(isa for isa in ISAS if isa != "portable")  # multiply-adds rounded once
BIG = 3000  # rows of codes that make even M = 1 large enough for several threads


def operands(m: int, k: int, n: int, seed: int = 0) -> Operands:
    """x float32 [m, k] with a few values a hundred times larger, codes int8 [n, k], scale float32 [n]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * np.where(rng.random((m, k)) < 0.02, 100.0, 1.0)
    codes = rng.integers(-128, 128, (n, k), dtype=np.int8)
    return x.astype(np.float32), codes, rng.uniform(1e-3, 1e-2, n).astype(np.float32)


def reference(x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ codes.astype(np.float64).T) * scale


def assert_accurate(actual: jax.Array, x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
    """Within what rounding may do: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1.

    A result passes through at most ceil(K / 16) additions of a partial sum, 4 that join the 16 partial sums,
    its product and its scale, each with a relative error of 2**-24.
    """
    roundings = -(-x.shape[1] // 16) + 6
    bound = roundings * 2.0**-24 * reference(np.abs(x), np.abs(codes.astype(np.int16)), scale)
    assert actual.dtype == np.float32
    assert (np.abs(np.asarray(actual, np.float64) - reference(x, codes, scale)) <= 1.001 * bound).all()


def test_library_is_built_where_there_is_a_compiler() -> None:
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert native.library() is not None


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 100, 513, 1537, 4099])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 33])
def test_close_to_float64(m: int, k: int, isa: str) -> None:
    for n in (1, 3, 29):
        args = operands(m, k, n)
        assert_accurate(quantized_dot(*args, isa=isa), *args)


@needs_library
@pytest.mark.parametrize(("m", "k", "n"), [(0, 32, 4), (2, 32, 0), (2, 0, 4), (0, 0, 0)])
def test_empty_sizes(m: int, k: int, n: int) -> None:
    np.testing.assert_array_equal(quantized_dot(*operands(m, k, n)), np.zeros((m, n), np.float32))


@needs_library
def test_extreme_codes_are_exact() -> None:
    x = np.ones((1, 64), np.float32)
    codes = np.stack([np.full(64, -128, np.int8), np.full(64, 127, np.int8)])
    np.testing.assert_array_equal(quantized_dot(x, codes, np.ones(2, np.float32)), [[-8192.0, 8128.0]])


@needs_library
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_alone(bad: float) -> None:
    x, codes, scale = operands(5, 50, 7)
    expected = np.asarray(quantized_dot(x, codes, scale))
    x[2, 49] = bad
    actual = np.asarray(quantized_dot(x, codes, scale))
    assert not np.isfinite(actual[2]).any()
    np.testing.assert_array_equal(np.delete(actual, 2, 0), np.delete(expected, 2, 0))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "n"), [(1000, BIG), (130, 50)])
def test_same_bits_whatever_the_number_of_rows(k: int, n: int, isa: str) -> None:
    x, codes, scale = operands(128, k, n)
    expected = np.concatenate([quantized_dot(row[None], codes, scale, isa=isa) for row in x])
    for rows in (2, 3, 4, 8, 128):
        actual = np.concatenate(
            [quantized_dot(x[i : i + rows], codes, scale, isa=isa) for i in range(0, 120, rows)]
        )
        np.testing.assert_array_equal(actual, expected[: len(actual)])


@needs_library
def test_same_bits_alone_and_among_threads() -> None:
    x, codes, scale = operands(3, 1000, BIG)
    few = np.concatenate(
        [quantized_dot(x, codes[i : i + 100], scale[i : i + 100]) for i in range(0, BIG, 100)], axis=1
    )
    np.testing.assert_array_equal(quantized_dot(x, codes, scale), few)


@needs_library
@pytest.mark.parametrize("m", [1, 5])
def test_instruction_sets_agree(m: int) -> None:
    args = operands(m, 777, 31)
    fused = [np.asarray(quantized_dot(*args, isa=isa)) for isa in FUSED]
    for other in fused[1:]:
        np.testing.assert_array_equal(other, fused[0])
    if fused:
        portable = np.asarray(quantized_dot(*args, isa="portable"))
        assert np.abs(portable - fused[0]).max() <= 1e-6 * np.abs(fused[0]).max()


@needs_library
def test_inside_jit_and_while_loop() -> None:
    x, codes, scale = operands(2, 2048, 2048)

    @jax.jit
    def repeat(x: jax.Array, times: int) -> jax.Array:
        step = lambda state: (state[0] + 1, jnp.tanh(quantized_dot(state[1], codes, scale)))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < times, step, (0, x))[1]

    expected = x
    for _ in range(20):
        expected = np.asarray(jnp.tanh(quantized_dot(expected, codes, scale)))
    np.testing.assert_array_equal(repeat(x, 20), expected)


@needs_library
def test_many_threads_at_once() -> None:
    """More callers than threads in XLA's pool, each sharing its work with that pool."""
    args = operands(4, 1024, BIG)
    run = jax.jit(quantized_dot)
    expected = np.asarray(run(*args))
    with ThreadPoolExecutor(16) as pool:
        for actual in pool.map(lambda _: np.asarray(run(*args)), range(200)):
            np.testing.assert_array_equal(actual, expected)


@needs_library
def test_independent_calls_in_one_program() -> None:
    """XLA runs these at once on its own pool, so the kernel waits inside the pool it hands work to."""
    args = [operands(2, 1024, BIG, seed) for seed in range(8)]
    actual = jax.jit(lambda args: [quantized_dot(*a) for a in args])(args)
    for a, y in zip(args, actual, strict=True):
        assert_accurate(y, *a)


GOOD = operands(2, 64, 3)


@needs_library
@pytest.mark.parametrize(
    ("args", "found"),
    [
        ((GOOD[0][:, :63], *GOOD[1:]), "float32[2, 63]"),
        ((GOOD[0][0], *GOOD[1:]), "x float32[64]"),
        ((*GOOD[:2], GOOD[2][:2]), "scale float32[2]"),
        ((GOOD[0].astype(jnp.bfloat16), *GOOD[1:]), "x bfloat16[2, 64]"),
        ((GOOD[0], GOOD[1].astype(np.uint8), GOOD[2]), "codes uint8[3, 64]"),
        ((*GOOD[:2], GOOD[2][:, None]), "scale float32[3, 1]"),
    ],
)
def test_refused_operands(args: Operands, found: str) -> None:
    with pytest.raises(OptionError) as error:
        quantized_dot(*args)
    assert found in str(error.value)


@needs_library
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((GOOD[0][:, :63], *GOOD[1:]), r"found x \[2, 63\], codes \[3, 64\], scale \[3\], y \[2, 3\]"),
        ((*GOOD[:2], GOOD[2][:2]), r"scale \[2\]"),
        ((GOOD[0].astype(np.float16), *GOOD[1:]), "expected F32 but got F16"),
        ((GOOD[0][0], *GOOD[1:]), "Wrong buffer rank"),
    ],
)
def test_native_code_refuses_operands_by_itself(args: Operands, message: str) -> None:
    """As a damaged or foreign program might call it, past the checks in Python."""
    native.register()
    call = jax.ffi.ffi_call(TARGET_INT8, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*args, isa="auto")


@needs_library
def test_result_of_another_shape_is_refused() -> None:
    native.register()
    call = jax.ffi.ffi_call(TARGET_INT8, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"y \[2, 4\]"):
        call(*GOOD, isa="auto")


@needs_library
def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match='cannot run isa "sse9"'):
        quantized_dot(*GOOD, isa="sse9")


@needs_library
@pytest.mark.parametrize("activations", ["int8_token", "int8_static", "fp8_token"])
@pytest.mark.parametrize("form", ["int8:channel", "int4:g32,asym"])
def test_rounded_activations_are_those_of_the_body(form: str, activations: str) -> None:
    """Int8 with int8 has exact sums: the bits of the body, for one row and many. Others are as near as floats."""
    rng, options = np.random.default_rng(0), {"out_dtype": "float32", "format": form, "activations": activations}
    x = jnp.asarray(rng.standard_normal((40, 640)), jnp.float32)
    parts = [jnp.asarray(p) for p in parse_format(form).encode(rng.standard_normal((96, 640)).astype(np.float32))]
    step = [jnp.float32(0.02)] * activations.endswith("static")
    assert cpu.uncovered(x, *parts, *step, **options) is None
    expected = np.asarray(jax.jit(lambda *a: operation.body(*a, **options))(x, *parts, *step))
    for rows in (1, 8, 40):
        found = np.asarray(jax.jit(lambda *a: cpu.product(*a, **options))(x[:rows], *parts, *step))
        if form == "int8:channel" and activations.startswith("int8"):
            np.testing.assert_array_equal(found, expected[:rows])
        assert np.abs(found - expected[:rows]).max() <= 1e-6 * np.abs(expected).max()
