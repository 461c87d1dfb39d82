"""The CPU kernels of quantized_dot with 4-bit codes, bit by bit against NumPy in the order that they state."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot import cpu
from xlathe.kernels.quantized_dot.cpu import TARGETS_INT4, quantized_dot_int4
from xlathe.ops.quantized_dot import quantized_dot

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without a C++ compiler")
ISAS = native.available_isas() if native.library() else ()
FUSED = tuple(isa for isa in ISAS if isa != "portable")  # multiply-adds rounded once
KINDS = [(activations, symmetric) for activations in (None, "int8") for symmetric in (True, False)]
BIG = 2100  # rows of codes that make even M = 1 large enough for several threads


class Operands(NamedTuple):
    x: np.ndarray  # float32 [m, k]
    codes: np.ndarray  # uint8 [n, k / 2]
    scale: np.ndarray  # bfloat16 [n, k / group]
    zero: np.ndarray | None  # uint8 [n, k / group]


def operands(m: int, k: int, n: int, *, symmetric: bool, group: int = 32, seed: int = 0) -> Operands:
    """All codes and zero points, scales of both signs, and a few activations a hundred times larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * np.where(rng.random((m, k)) < 0.02, 100.0, 1.0)
    codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scale = (rng.uniform(1e-3, 1e-2, (n, k // group)) * rng.choice([-1, 1], (n, k // group))).astype(jnp.bfloat16)
    zero = None if symmetric else rng.integers(0, 16, scale.shape, dtype=np.uint8)
    return Operands(x.astype(np.float32), codes, scale, zero)


def run(args: Operands, activations: str | None, isa: str = "auto") -> np.ndarray:
    return np.asarray(quantized_dot_int4(*args, activations=activations, isa=isa))


def parts(args: Operands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The code, the zero point and the scale of every weight, [n, k] each."""
    codes = np.empty((len(args.codes), args.x.shape[1]), np.int64)
    codes[:, 0::2], codes[:, 1::2] = args.codes % 16, args.codes // 16
    group = codes.shape[1] // args.scale.shape[1]
    zeros = np.full_like(codes, 8) if args.zero is None else np.repeat(args.zero, group, axis=1).astype(np.int64)
    return codes, zeros, np.repeat(args.scale.astype(np.float32), group, axis=1)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def folded(totals: np.ndarray) -> np.ndarray:
    for half in (8, 4, 2, 1):
        totals = totals[..., :half] + totals[..., half:]
    return totals[..., 0]


def steps_of(array: np.ndarray, size: int) -> np.ndarray:
    """[rows, k] as [k / size, rows, size], zeros added at the end."""
    padded = np.pad(array, [(0, 0), (0, -array.shape[1] % size)])
    return padded.reshape(len(array), -1, size).swapaxes(0, 1)


def rounded(x: np.ndarray, largest_integer: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers [m, k / 32, 32] and their step [m, k / 32]."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(largest_integer), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.int64), largest * np.float32(1 / largest_integer)


def in_lanes(args: Operands) -> np.ndarray:
    """Of 128 columns 16 lanes hold 8 each, summed in integers; the sum times (scale * step) is added to 16 totals."""
    x, step = rounded(args.x, 127 * 2**16)
    x, step = x.reshape(args.x.shape), np.repeat(step, 32, axis=1)
    totals = np.zeros((len(x), len(args.codes), 16), np.float32)
    codes, zeros, scales = (steps_of(a, 128) for a in parts(args))
    for x_, t, c, z, s in zip(steps_of(x, 128), steps_of(step, 128), codes, zeros, scales, strict=True):
        sums = ((c - z)[None] * x_[:, None]).reshape(*totals.shape, 8).sum(axis=-1)
        assert np.abs(sums).max() < 2**31
        totals = fused(sums.astype(np.float32), s[None, :, ::8] * t[:, None, ::8], totals)
    return folded(totals)


def in_integers(args: Operands) -> np.ndarray:
    """A block of 32 is summed in integers; of block b the sum times (scale * step) is added to total b mod 16."""
    x, step = rounded(args.x, 127)
    codes, zeros, scales = parts(args)
    totals = np.zeros((len(args.x), len(args.codes), 16), np.float32)
    for b in range(step.shape[1]):
        sums = x[:, b] @ (codes - zeros)[:, 32 * b : 32 * b + 32].T
        factor = scales[None, :, 32 * b] * step[:, b, None]
        totals[..., b % 16] = fused(sums.astype(np.float32), factor, totals[..., b % 16])
    return folded(totals)


def expected(args: Operands, activations: str | None) -> np.ndarray:
    return in_lanes(args) if activations is None else in_integers(args)


@pytest.mark.parametrize(("activations", "symmetric"), KINDS)
@pytest.mark.parametrize("k", [32, 96, 128, 512, 544, 1184, 4224])
def test_the_order_that_is_stated(k: int, activations: str | None, symmetric: bool) -> None:
    for m, n in [(1, 1), (1, 29), (2, 13), (3, 7), (5, 24), (8, 31)]:
        args = operands(m, k, n, symmetric=symmetric, seed=m)
        for isa in FUSED:
            np.testing.assert_array_equal(run(args, activations, isa), expected(args, activations))


@pytest.mark.parametrize(("activations", "symmetric"), KINDS)
@pytest.mark.parametrize("group", [64, 128, 256, 1024])
def test_larger_groups(group: int, activations: str | None, symmetric: bool) -> None:
    for m in (1, 2, 4):
        args = operands(m, 5120, 15, symmetric=symmetric, group=group)
        for isa in FUSED:
            np.testing.assert_array_equal(run(args, activations, isa), expected(args, activations))


@pytest.mark.parametrize(("activations", "symmetric"), KINDS)
@pytest.mark.parametrize("k", [32, 544])
def test_equals_the_reference_body(k: int, activations: str | None, symmetric: bool) -> None:
    args = operands(4, k, 21, symmetric=symmetric)
    options = {"out_dtype": "float32", "activations": activations}
    options["format"] = "int4:g32" if symmetric else "int4:g32,asym"
    body = jax.jit(lambda *a: quantized_dot(*a, **options))(*(a for a in args if a is not None))
    for isa in ISAS:
        assert np.abs(run(args, activations, isa) - body).max() <= 1e-6 * np.abs(body).max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_numbers_of_24_bits_are_as_good_as_floats(symmetric: bool) -> None:
    """The error is half a step a column, 2**-24 of the largest in its block of 32, and 2**-24 a float operation."""
    for scale in (1e-20, 1.0, 1e20):
        args = operands(5, 1056, 64, symmetric=symmetric)
        args.x[:] *= scale
        codes, zeros, scales = parts(args)
        weight = (codes - zeros) * scales.astype(np.float64)
        largest = np.repeat(np.abs(args.x.reshape(5, -1, 32)).max(axis=-1), 32, axis=-1).astype(np.float64)
        operations = 2 + 1056 / 128 + 4 + 2  # inverse and product, totals, fold, sum to float and (scale * step)
        bound = 2.0**-24 * ((1 + 2.0**-6) * largest + operations * np.abs(args.x)) @ np.abs(weight).T
        assert (np.abs(run(args, None) - args.x.astype(np.float64) @ weight.T) <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_float16_scales_are_exact(symmetric: bool) -> None:
    """Before: scales of 11 bits. Expected: the error of two products whose weights are at most 1 + 2**-7 as large."""
    args = operands(3, 544, 5, symmetric=symmetric)
    scale = np.random.default_rng(1).uniform(-1e-2, 1e-2, args.scale.shape).astype(np.float16)
    codes, zeros, _ = parts(args)
    weight = (codes - zeros) * np.repeat(scale.astype(np.float64), 32, axis=1)
    stored = f"int4:g32{'' if symmetric else ',asym'},s=f16"
    given = [array for array in (args.codes, scale, args.zero) if array is not None]
    assert cpu.uncovered(jnp.asarray(args.x), *map(jnp.asarray, given), out_dtype="float32", format=stored) is None
    y = jax.jit(lambda x, *each: cpu.product(x, *each, out_dtype="float32", format=stored))(args.x, *given)
    largest = np.repeat(np.abs(args.x.reshape(3, -1, 32)).max(axis=-1), 32, axis=-1).astype(np.float64)
    operations = 2 + 544 / 128 + 4 + 2 + 1  # as above, and the sum of both
    bound = 2.0**-24 * ((1 + 2.0**-6) * largest + operations * np.abs(args.x)) @ np.abs(weight).T * (1 + 2.0**-7)
    assert (np.abs(y - args.x.astype(np.float64) @ weight.T) <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_activations_costs_less_than_a_percent(symmetric: bool) -> None:
    args = operands(3, 4096, 64, symmetric=symmetric)
    args.x[:] = np.random.default_rng(1).standard_normal(args.x.shape)
    exact, approximate = run(args, None), run(args, "int8")
    assert 1e-4 < np.linalg.norm(approximate - exact) / np.linalg.norm(exact) < 1e-2


@pytest.mark.parametrize(("activations", "symmetric"), KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_whatever_the_number_of_rows(isa: str, activations: str | None, symmetric: bool) -> None:
    for k, n in [(1056, BIG), (160, 50)]:
        args = operands(16, k, n, symmetric=symmetric)
        alone = np.concatenate([run(args._replace(x=row[None]), activations, isa) for row in args.x])
        for rows in (2, 3, 7, 8, 16):
            parts = [run(args._replace(x=args.x[i : i + rows]), activations, isa) for i in range(0, 16, rows)]
            np.testing.assert_array_equal(np.concatenate(parts), alone)


@pytest.mark.parametrize(("activations", "symmetric"), KINDS)
def test_same_bits_alone_and_among_threads(activations: str | None, symmetric: bool) -> None:
    args = operands(3, 1024, BIG, symmetric=symmetric)

    def some(i: int) -> np.ndarray:
        return run(Operands(args.x, *(a if a is None else a[i : i + 100] for a in args[1:])), activations)

    few = np.concatenate([some(i) for i in range(0, BIG, 100)], axis=1)
    np.testing.assert_array_equal(run(args, activations), few)
    with ThreadPoolExecutor(8) as pool:
        for many in pool.map(lambda _: run(args, activations), range(40)):
            np.testing.assert_array_equal(many, few)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_values_are_exact(isa: str, activations: str | None) -> None:
    """Sums that are whole numbers below 2**24 have no rounding, in any order."""
    codes = np.stack([np.full(256, c, np.uint8) for c in (0x00, 0xFF, 0x88, 0x08)])
    ones = np.ones((4, 16)).astype(jnp.bfloat16)
    signs = np.stack([np.full(512, 127), np.full(512, -127), np.zeros(512)]).astype(np.float32)
    symmetric = run(Operands(signs, codes, ones, None), activations, isa)
    np.testing.assert_array_equal(symmetric[0], 127 * 512 * np.array([-8, 7, 0, -4]))
    np.testing.assert_array_equal(symmetric[1:], [-symmetric[0], np.zeros(4)])
    zero = np.repeat(np.array([[15], [0], [8], [0]], np.uint8), 16, axis=1)
    asymmetric = run(Operands(signs, codes, ones, zero), activations, isa)
    np.testing.assert_array_equal(asymmetric[0], 127 * 512 * np.array([-15, 15, 0, 4]))


@pytest.mark.parametrize("activations", [None, "int8"])
def test_one_huge_activation_leaves_groups_of_zeros_alone(activations: str | None) -> None:
    args = operands(1, 96, 9, symmetric=True)
    args.x[0, 40] = 1e30
    args.codes[:, 16:32], args.scale[:, 1] = 0x88, 0  # as zeros are quantized
    without = args._replace(x=np.where(np.arange(96) // 32 == 1, 0, args.x).astype(np.float32))
    np.testing.assert_array_equal(run(args, activations), run(without, activations))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("tiny", [0.0, 1e-31, -1e-38])
def test_activations_next_to_zero(tiny: float, activations: str | None) -> None:
    args = operands(2, 64, 5, symmetric=False)
    args.x[0] = tiny
    assert np.abs(run(args, activations)[0]).max() <= 1e-30


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_alone(bad: float, activations: str | None) -> None:
    args = operands(5, 544, 7, symmetric=True)
    before = run(args, activations)
    args.x[2, 543] = bad
    after = run(args, activations)
    assert not np.isfinite(after[2]).any()
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 32, 4), (2, 32, 0), (2, 0, 4)])
def test_empty_sizes(m: int, k: int, n: int, activations: str | None) -> None:
    args = operands(m, k, n, symmetric=True)
    np.testing.assert_array_equal(run(args, activations), np.zeros((m, n), np.float32))


GOOD = operands(2, 64, 3, symmetric=False)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"x": GOOD.x[:, :32]}, r"x float32\[2, 32\]"),
        ({"x": GOOD.x.astype(jnp.bfloat16)}, r"x bfloat16\[2, 64\]"),
        ({"codes": GOOD.codes[:2]}, r"codes uint8\[2, 32\]"),
        ({"codes": GOOD.codes.astype(np.int8)}, r"codes int8\[3, 32\]"),
        ({"scale": GOOD.scale.astype(np.float32)}, r"scale float32\[3, 2\]"),
        ({"scale": np.repeat(GOOD.scale, 2, axis=1)}, r"scale bfloat16\[3, 4\]"),
        ({"zero": GOOD.scale}, r"zero bfloat16\[3, 2\]"),
        ({"zero": np.zeros((3, 1), np.uint8)}, r"zero uint8\[3, 1\]"),
    ],
)
def test_refused_operands(changed: dict[str, np.ndarray], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        quantized_dot_int4(*GOOD._replace(**changed))


@pytest.mark.parametrize("target", TARGETS_INT4.values())
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": GOOD.x[:, :32]}, r"found x \[2, 32\], codes \[3, 32\], scale \[3, 2\], zero \[3, 2\], y \[2, 3\]"),
        ({"scale": GOOD.scale[:, :0], "zero": GOOD.codes[:, :0]}, r"scale \[3, 0\]"),
        ({"scale": np.repeat(GOOD.scale, 2, axis=1)}, r"scale \[3, 4\]"),
        ({"zero": GOOD.codes}, r"zero \[3, 32\]"),
        ({"codes": GOOD.codes[:2]}, r"codes \[2, 32\]"),
    ],
)
def test_native_code_refuses_operands_by_itself(changed: dict[str, np.ndarray], message: str, target: str) -> None:
    """As a damaged or foreign program might call it, past the checks in Python."""
    native.register()
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*GOOD._replace(**changed), isa="auto")


def test_groups_without_a_kernel() -> None:
    x, codes, scale = jnp.zeros((2, 64)), jnp.zeros((3, 32), jnp.uint8), jnp.zeros((3, 4), jnp.bfloat16)
    reason = cpu.uncovered(x, codes, scale, out_dtype="float32", format="int4:g16")
    assert reason is not None and "32, 64, 128, 256, 512, 1024 with scales in bfloat16" in reason
    assert reason.endswith("found int4:g16")
