"""The CPU kernels of quantized_dot on packed blocks, beside float64 and the reference body, over all bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.storage.test_blocks import by_gguf, random_blocks
from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.quantized_dot.coverage import BLOCKS
from xlathe.kernels.quantized_dot.cpu import TARGET_BLOCKS, product, quantized_dot_blocks
from xlathe.kernels.quantized_dot.cpu_ragged import quantized_ragged_dot
from xlathe.ops.activations import round_blocks
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.ops.quantized_ragged_dot import quantized_ragged_dot as ragged_operation
from xlathe.storage import Blocks

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without a C++ compiler")
ISAS = native.available_isas() if native.library() else ()
FUSED = tuple(isa for isa in ISAS if isa != "portable")  # multiply-adds rounded once
WAYS = (None, "int8")
BIG = 2100  # rows that make even M = 1 large enough for several threads


def blocks_of(name: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    return random_blocks(name, n, k // Blocks(name).layout.numbers, seed)


def activations(m: int, k: int, seed: int = 0) -> np.ndarray:
    """A few are thirty times larger than others."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((m, k)) * np.where(rng.random((m, k)) < 0.02, 30.0, 1.0)).astype(np.float32)


def run(x: np.ndarray, blocks: np.ndarray, name: str, way: str | None, isa: str = "auto") -> np.ndarray:
    return np.asarray(quantized_dot_blocks(x, blocks, stored=Blocks(name), activations=way, isa=isa))


def exact(x: np.ndarray, blocks: np.ndarray, name: str, way: str | None) -> np.ndarray:
    """In float64, x rounded in float32 as the operation says."""
    if way:
        levels, step = round_blocks(jnp.asarray(x), Blocks(name).layout.numbers)
        x = (np.asarray(levels, np.float64) * np.asarray(step)[..., None]).reshape(x.shape)
    return x.astype(np.float64) @ by_gguf(name, blocks).astype(np.float64).T


def sizes(name: str) -> list[tuple[int, int, int]]:
    """m, n, k: whole steps of 64 columns, and what is left of one."""
    if Blocks(name).layout.numbers == 256:
        return [(1, 1, 256), (3, 49, 512), (6, 97, 2304)]
    return [(1, 1, 32), (2, 49, 64), (3, 50, 96), (6, 97, 2304), (1, 3, 4128)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_is_the_product_with_what_the_bytes_stand_for(name: str, way: str | None, isa: str) -> None:
    """Of each result: the roundings of its sum, in units of 2**-24 of the sum of all magnitudes, and of x."""
    for seed, (m, n, k) in enumerate(sizes(name)):
        x, blocks = activations(m, k, seed), blocks_of(name, n, k, seed)
        expected, found = exact(x, blocks, name, way), run(x, blocks, name, way, isa)
        weight = np.abs(by_gguf(name, blocks)).astype(np.float64)
        largest = weight.reshape(n, -1, 32).max(axis=-1, keepdims=True)  # codes and offsets are not much larger
        magnitudes = np.abs(x).reshape(m, -1, 32).max(axis=-1, keepdims=True) * np.ones(32)
        bound = magnitudes.reshape(m, k) @ (largest * np.ones(32)).reshape(n, k).T
        assert (np.abs(found - expected) <= 2.0**-22 * bound).all()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_reference_body(name: str, way: str | None) -> None:
    x, blocks = activations(10, 768).reshape(2, 5, 768), blocks_of(name, 70, 768)
    options = {"out_dtype": "float32", "format": name} | ({"activations": way} if way else {})
    expected = np.asarray(quantized_dot.body(x, jnp.asarray(blocks), **options))
    found = np.asarray(product(x, jnp.asarray(blocks), **options))
    assert found.shape == (2, 5, 70) and np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", BLOCKS)
def test_as_good_as_floats(name: str) -> None:
    """Root of the mean squared error against float64, beside NumPy's product in float32."""
    x, blocks = np.random.default_rng(0).standard_normal((4, 2048)).astype(np.float32), blocks_of(name, 300, 2048)
    expected = exact(x, blocks, name, None)
    floats = x @ by_gguf(name, blocks).T
    error, allowed = (np.sqrt(np.square(found - expected).mean()) for found in (run(x, blocks, name, None), floats))
    assert error <= 2 * allowed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_bits(name: str, way: str | None) -> None:
    """Alone, in any company, among threads, and on every instruction set that rounds a multiply-add once."""
    x, blocks = activations(7, 768), blocks_of(name, BIG, 768)
    together = run(x, blocks, name, way)
    for m in (1, 2, 3, 5):
        np.testing.assert_array_equal(run(x[:m], blocks, name, way), together[:m])
    np.testing.assert_array_equal(run(x, blocks[:31], name, way), together[:, :31])
    for isa in FUSED:
        np.testing.assert_array_equal(run(x, blocks[:60], name, way, isa), together[:, :60])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_not_finite_stays_in_its_row(name: str, way: str | None) -> None:
    x, blocks = activations(4, 512), blocks_of(name, 20, 512)
    clean = run(x, blocks, name, way)
    x[1, 3] = np.nan
    found = run(x, blocks, name, way)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2, 3]], clean[[0, 2, 3]])
    assert not run(np.zeros((2, 512), np.float32), blocks, name, way).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_what_overflows_is_not_finite_and_nothing_else_is_wrong(name: str, way: str | None) -> None:
    """Before: rows with an infinity, with numbers next to the largest, and one whose sum is below 2**96. Expected: what
    float32 does not hold is not finite, NaN or infinite; what is finite is right; and below 2**96 all is."""
    x, blocks = activations(6, 512), blocks_of(name, 20, 512)
    x[:5, 3] = np.inf, -np.inf, 3e38, 1e36, 1e34
    x[5] *= 2.0**95 / np.abs(x[5]).sum()
    with np.errstate(all="ignore"):
        expected, found = exact(x, blocks, name, way), run(x, blocks, name, way)
        held = np.abs(expected) <= np.finfo(np.float32).max
        weight = np.abs(by_gguf(name, blocks)).astype(np.float64)
        bound = np.abs(x).astype(np.float64).max(axis=1, keepdims=True) * weight.max(axis=1) * x.shape[1]
    finite = np.isfinite(found)
    assert not finite[~held].any() and finite[5].all() and held[2:5].any()
    assert (np.abs(found - expected)[finite] <= 2.0**-22 * bound[finite]).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_each_group_of_rows_has_its_expert(name: str, way: str | None) -> None:
    x, counts = activations(14, 512), jnp.array([3, 0, 1, 9], jnp.int32)
    blocks = jnp.asarray(blocks_of(name, 200, 512).reshape(4, 50, -1))
    options = {"out_dtype": "float32", "format": name} | ({"activations": way} if way else {})
    found = quantized_ragged_dot(x, counts, blocks, **options)
    expected = ragged_operation.body(x, counts, blocks, **options)
    assert jnp.abs(found - expected).max() <= 1e-5 * jnp.abs(expected).max() and not found[-1].any()
    np.testing.assert_array_equal(found[:3], run(x[:3], blocks[0], name, way))


def test_refused_operands() -> None:
    x, blocks = np.zeros((2, 512), np.float32), np.zeros((3, 288), np.uint8)
    for bad in (x.astype(np.float16), x[:, :256], x[:, :500]):
        with pytest.raises(OptionError, match=r"expected x float32 \[M, K\], blocks uint8 \[N, bytes of K in q4_k\]"):
            quantized_dot_blocks(bad, blocks, stored=Blocks("q4_k"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"type": "Q2_K"}, 'no kernel for blocks of type "Q2_K"'),
        ({"activations": "int4"}, 'activations "int4"'),
        ({"isa": "avx9"}, 'cannot run isa "avx9"'),
        ({"type": "Q6_K"}, r"found x \[2, 512\], blocks \[3, 288\], y \[2, 3\]"),
    ],
    ids=str,
)
def test_native_code_refuses_by_itself(changed: dict[str, str], message: str) -> None:
    native.register()
    call = jax.ffi.ffi_call(TARGET_BLOCKS, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    options = {"type": "Q4_K", "activations": "", "isa": "auto"} | changed
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        call(np.zeros((2, 512), np.float32), np.zeros((3, 288), np.uint8), **options).block_until_ready()
