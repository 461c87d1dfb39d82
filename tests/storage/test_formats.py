"""Storage formats beside NumPy written out from what defines them, and what each makes of bad input."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.storage import Scaled, parse_format, take_lines
from xlathe.storage.elements import pack_bits

N, K = 200, 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FORMATS = [
    *("int8:channel", "int8:tensor", "int8:g64,asym", "int4:g32", "int4:g64,asym", "int4:channel"),
    "int4:g128,asym,s=f16",
    *("int4:g64,z=bf16", "int3:g32", "int3:g128,asym", "int2:g64", "int2:g32,asym", "int4:b16x16", "fp8_e4m3:tensor"),
    *("fp8_e4m3:channel", "fp8_e4m3:b128x128", "fp8_e5m2:channel", "fp8_e5m2:tensor", "nf4:g64", "nf4:channel"),
    *("mxfp4", "mxfp8", "nvfp4", "bf16", "f16"),
]


def normal(n: int = N, k: int = K, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def decoded(form: str, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.asarray(jax.jit(parse_format(form).dequantize)(*map(jnp.asarray, parts)))


@pytest.mark.parametrize("form", FORMATS)
def test_text_round_trips(form: str) -> None:
    assert str(parse_format(form)) == form


@pytest.mark.parametrize(
    ("short", "full"),
    [
        *(("int8", "int8:channel"), ("int4", "int4:g32"), ("int3:asym", "int3:g32,asym"), ("nf4", "nf4:g64")),
        *(("fp8_e4m3", "fp8_e4m3:channel"), ("int4:asym,g32,s=bf16", "int4:g32,asym")),
        *(("fp4_e2m1:g32,s=e8m0", "mxfp4"), ("fp4_e2m1:s=e4m3,g16", "nvfp4"), ("int4:b1x64", "int4:g64")),
        ("int8:channel,s=f32", "int8:channel"),
    ],
)
def test_defaults_are_told(short: str, full: str) -> None:
    assert str(parse_format(short)) == full


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("int5", "'int5' is not known; did you mean 'int"),
        ("int4:q32", "option 'q32' is not known"),
        ("int4:g32,g64", "g32 and g64 exclude each other"),
        ("int4:g0", "option 'g0' is not known"),
        ("int3:g12", "group=12: expected a positive multiple of 8"),
        ("nvfp4:g32", "nvfp4 has no options"),
        ("nf4:asym", "zero points are for integers"),
        ("int4:s=e8m0", "s=e8m0 is for floats"),
    ],
)
def test_texts_that_are_none(form: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_format(form)


@pytest.mark.parametrize("form", FORMATS)
def test_parts_are_as_told_and_rows_can_be_looked_up(form: str) -> None:
    stored, weight = parse_format(form), normal()
    parts = stored.encode(weight)
    told = stored.parts(N, K)
    assert [(p.shape, p.dtype) for p in parts] == [(t.shape, t.dtype) for t in told.values()]
    assert stored.bits(N, K) == 8 * sum(p.nbytes for p in parts) / weight.size
    whole = decoded(form, parts)
    assert whole.shape == (N, K) and whole.dtype == np.float32
    index = jnp.array([[3, 0], [199, 128]])
    np.testing.assert_array_equal(stored.decode(*take_lines(stored, index, *map(jnp.asarray, parts))), whole[index])


@pytest.mark.parametrize("form", [f for f in FORMATS if f not in ("bf16", "f16")])
def test_no_other_code_is_nearer(form: str) -> None:
    """Every weight beside all levels of its element, scaled as it is."""
    stored, weight = parse_format(form), normal(64, 128)
    assert isinstance(stored, Scaled)
    parts, element = stored.encode(weight), stored.levels
    codes = np.arange(2**element.bits, dtype=np.uint8)[None]
    packed = codes.view(parts[0].dtype) if element.bits == 8 else pack_bits(np.resize(codes, (1, 16)), element.bits)
    levels = np.unique(np.clip(np.asarray(element.unpack(jnp.asarray(packed))), -element.largest - 1, element.largest))
    levels = levels[np.isfinite(levels)]
    spread = stored.spread(stored.fit(weight), (64, 128))
    scale, zero = (np.broadcast_to(each, weight.shape)[..., None] for each in spread)
    least = np.abs(stored.values(levels, scale, zero) - weight[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(decoded(form, parts) - weight), least, rtol=1e-5, atol=1e-6)


FLOORS = [("int8:channel", 40), ("fp8_e4m3:channel", 25), ("mxfp8", 25), ("nvfp4", 15)]


@pytest.mark.parametrize(("form", "decibels"), FLOORS)
def test_signal_to_noise(form: str, decibels: float) -> None:
    """At least what torchao's tests ask for, on N(0, 1)."""
    weight = normal()
    noise = decoded(form, parse_format(form).encode(weight)) - weight
    assert 10 * np.log10((weight**2).mean() / (noise**2).mean()) >= decibels


def nearest_e2m1(x: np.ndarray) -> np.ndarray:
    """The nearest of e2m1's numbers, ties to the even mantissa, by trying all."""
    distance = np.abs(np.abs(x)[..., None] - E2M1)
    tied = distance - 1e-12 * (np.arange(8) % 2 == 0)
    return np.sign(x) * E2M1[tied.argmin(axis=-1)]


def test_mxfp4_by_the_specification() -> None:
    """OCP MX 1.0, 6.3: shared exponent floor(log2(absmax)) less that of the largest number, 2 in e2m1."""
    weight = normal(seed=1) * 2.0 ** np.random.default_rng(2).integers(-9, 9, (N, 1)).astype(np.float32)
    codes, scale = parse_format("mxfp4").encode(weight)
    blocks = weight.astype(np.float64).reshape(N, -1, 32)
    shared = np.floor(np.log2(np.abs(blocks).max(axis=-1))) - 2
    np.testing.assert_array_equal(scale, shared + 127)
    expected = nearest_e2m1(blocks / 2 ** shared[..., None]) * 2 ** shared[..., None]
    np.testing.assert_array_equal(decoded("mxfp4", (codes, scale)).reshape(blocks.shape), expected)


def test_mxfp8_by_the_specification() -> None:
    """As mxfp4, with the exponent 8 of e4m3's largest number, 448; what is beyond it becomes it."""
    weight = normal(seed=3)
    codes, scale = parse_format("mxfp8").encode(weight)
    blocks = weight.reshape(N, -1, 32)
    shared = np.floor(np.log2(np.abs(blocks).max(axis=-1))) - 8
    np.testing.assert_array_equal(scale, shared + 127)
    scaled = np.clip(blocks / np.float32(2) ** shared[..., None].astype(np.float32), -448, 448)
    assert (np.abs(scaled) == 448).any()
    np.testing.assert_array_equal(codes.reshape(blocks.shape), scaled.astype(ml_dtypes.float8_e4m3fn))


def test_all_scales_of_mx() -> None:
    """Every exponent byte is its power of two; 255 is NaN."""
    scale = np.arange(256, dtype=np.uint8)[:, None]
    codes = np.full((256, 16), 0x22, np.uint8)  # ones
    found = decoded("mxfp4", (codes, scale))
    expected = 2.0 ** (np.arange(256) - 127)
    keep = slice(1, 255)  # 2**-127 is below float32's normal numbers, which XLA takes for zeros
    np.testing.assert_array_equal(found[keep, 0], expected[keep])
    assert found[0, 0] in (0, expected[0]) and np.isnan(found[255]).all()


def test_nvfp4_by_its_definition() -> None:
    """Scales e4m3 of 16 weights over a factor, with which the largest scale of the tensor is 448: absmax / 6 / 448."""
    weight = normal(seed=4)
    codes, scale, outer = parse_format("nvfp4").encode(weight)
    np.testing.assert_allclose(outer, np.abs(weight).max() / 6 / 448, rtol=1e-6)
    blocks = weight.reshape(N, -1, 16)
    local = (np.abs(blocks).max(axis=-1) / np.float32(6) / outer).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(scale, local)
    step = local.astype(np.float64)[..., None] * outer
    expected = nearest_e2m1(blocks / step) * step
    np.testing.assert_allclose(decoded("nvfp4", (codes, scale, outer)).reshape(blocks.shape), expected, rtol=2e-7)


def test_fp8_of_blocks_by_its_definition() -> None:
    """absmax / 448 of 128 x 128 weights, the last ones cut at 200 rows and 300 columns."""
    weight = normal(200, 300, seed=5)
    codes, scale = parse_format("fp8_e4m3:b128x128").encode(weight)
    assert scale.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        np.testing.assert_allclose(scale[i, j], np.abs(weight[block]).max() / 448, rtol=1e-6)
        cast = np.clip(weight[block] / scale[i, j], -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(codes[block], cast)
        whole = decoded("fp8_e4m3:b128x128", (codes, scale))
        np.testing.assert_array_equal(whole[block], cast.astype(np.float32) * scale[i, j])


@pytest.mark.parametrize("form", FORMATS)
def test_rows_and_groups_of_zeros_stay_zeros(form: str) -> None:
    weight = normal()
    weight[:7], weight[9, :128] = 0, 0
    found = decoded(form, parse_format(form).encode(weight))
    assert np.isfinite(found).all() and not found[:7].any() and not found[9, :128].any()
    assert not decoded(form, parse_format(form).encode(np.zeros((N, K), np.float32))).any()


@pytest.mark.parametrize("form", FORMATS)
def test_one_outlier_of_1e30_stays_in_its_block(form: str) -> None:
    """Expected: finite numbers; the outlier itself to 15 %, or a type's largest number; other blocks as without it."""
    weight = normal()
    without = decoded(form, parse_format(form).encode(weight))
    weight[150, 200] = 1e30
    stored = parse_format(form)
    found = decoded(form, stored.encode(weight))
    assert np.isfinite(found).all()
    narrow = form == "f16" or "f16" in form.split("=")
    assert found[150, 200] >= 65504 if narrow else abs(found[150, 200] / 1e30 - 1) < 0.26
    if stored != parse_format("nvfp4") and not form.endswith("tensor"):  # there all weights share a factor
        np.testing.assert_array_equal(found[:128, :128], without[:128, :128])


@pytest.mark.parametrize("form", [f for f in FORMATS if f.startswith("fp8")])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_fp8_never_overflows(form: str, scale: float) -> None:
    """A cast of JAX makes NaN of what is above 464; the largest weight of a block is the largest number."""
    weight = normal() * np.float32(scale)
    codes, _ = parse_format(form).encode(weight)
    largest = 448 if "e4m3" in form else 57344
    assert np.isfinite(codes.astype(np.float32)).all() and np.abs(codes.astype(np.float32)).max() == largest


@pytest.mark.parametrize(
    ("form", "k", "message"),
    [
        ("int4:g32", 48, "group=32 does not divide 48; g6, g8, g12, g16, g24, g48 would"),
        ("mxfp4", 40, "group=32 does not divide 40"),
        ("int3:channel", 12, "8 codes of 3 bits fill whole bytes, which does not divide 12"),
        ("int2:b16x16", 18, "4 codes of 2 bits fill whole bytes"),
    ],
)
def test_what_does_not_fit(form: str, k: int, message: str) -> None:
    assert (parse_format(form).misfit(4, k) or "").startswith(message)


@pytest.mark.parametrize("form", [f for f in FORMATS if f not in ("bf16", "f16")])
def test_a_method_gets_what_is_stored(form: str) -> None:
    """The grid under jit chooses the levels, and packs to the parts, that plain rounding does."""
    stored, weight = parse_format(form), normal(seed=6)
    assert isinstance(stored, Scaled)
    steps = jax.jit(stored.fit)(weight)
    scale, zero = stored.spread(steps, weight.shape)
    levels = jax.jit(stored.nearest)(weight, scale, zero)
    np.testing.assert_array_equal(decoded(form, stored.pack(levels, steps)), stored.values(levels, scale, zero))
    plain = stored.nearest(weight, *stored.spread(stored.fit(weight), weight.shape))
    assert (plain != levels).mean() < 1e-3  # compiled, a division by a constant is a product, rounded otherwise


def test_a_block_of_columns_is_fitted_alone() -> None:
    weight = normal()
    for form in ("int4:g32,asym", "fp8_e4m3:b128x128", "mxfp8"):
        stored = parse_format(form)
        assert isinstance(stored, Scaled)
        whole, own = stored.fit(weight), stored.fit(weight[:, 128:256])
        np.testing.assert_array_equal(own.scale, whole.scale[:, 128 // stored.columns :])


@pytest.mark.parametrize("form", ["int4:g32,s=f16", "int8:channel,s=f16"])
def test_scales_below_float16_are_zero(form: str) -> None:
    """Expected: zeros; float16 has nothing between them and 6e-8."""
    weight = 1e-9 * np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    stored = parse_format(form)
    assert not np.asarray(stored.dequantize(*stored.encode(weight))).any()
