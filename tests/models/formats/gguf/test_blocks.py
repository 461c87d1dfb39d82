"""Tensor types against the package gguf, whose codes llama.cpp's tests compare with its own."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tests.models.formats.gguf.build import file, info, write
from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf import blocks
from xlathe.models.formats.gguf.blocks import PLAIN, as_tensor, decode, encode
from xlathe.models.formats.gguf.container import open_container

RNG = np.random.default_rng(0)
DECODED = [kind for kind in GGML_QUANT_SIZES if kind not in PLAIN and kind.name not in ("Q1_0", "Q8_1", "Q8_K")]


def encoded(array: np.ndarray, kind: GGMLQuantizationType) -> bytes:
    return b"".join(chunk.tobytes() for chunk in encode(array, kind))


def of_bytes(tmp_path, kind, dims, data: bytes):
    return open_container(write(tmp_path, file([], [info("w", dims, kind, 0)], data)))


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_random_codes_decode_as_the_package_s_decoder_says(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "DECODED", 4 * 256)  # several chunks
    block, size = GGML_QUANT_SIZES[kind]
    codes = RNG.integers(0, 256, (7, 3 * 256 // block * size), dtype=np.uint8)
    container = of_bytes(tmp_path, kind, (3 * 256, 7), codes.tobytes())
    with np.errstate(all="ignore"):
        expected = quants.dequantize(codes, kind)
    np.testing.assert_array_equal(decode(container, container.entries["w"]), expected)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_numbers_are_what_numpy_reads(kind, tmp_path):
    expected = RNG.integers(0, 100, (3, 32)).astype(PLAIN[kind])
    container = of_bytes(tmp_path, kind, (32, 3), expected.tobytes())
    found = as_tensor(container, container.entries["w"]).read()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_a_type_without_decoder_is_refused_by_name(tmp_path):
    container = of_bytes(tmp_path, GGMLQuantizationType.Q8_K, (256,), bytes(292))
    with pytest.raises(CheckpointError, match=r"'w'.*found Q8_K"):
        as_tensor(container, container.entries["w"]).read()


def hard_numbers() -> np.ndarray:
    """Blocks of all sizes, zeros, halves to round, one outlier, denormals."""
    rows = [RNG.normal(size=(2000, 32)) * 10.0 ** RNG.uniform(-9, 4, (2000, 1)), np.zeros((1, 32))]
    halves = np.arange(-127, 127, 0.5)[: 15 * 32].reshape(-1, 32)
    halves[:, 0] = 127
    near = np.nextafter(np.float32(halves), np.float32(0))
    near[:, 0] = 127
    spike = np.full((1, 32), 1e-6)
    spike[0, 5] = 6e4
    return np.concatenate([*rows, halves, near, spike]).astype(np.float32)


def test_q8_0_is_bit_for_bit_the_reference_s():
    numbers = hard_numbers()
    expected = quants.quantize(numbers, GGMLQuantizationType.Q8_0)
    assert encoded(numbers, GGMLQuantizationType.Q8_0) == expected.tobytes()


def test_q8_0_of_numbers_too_small_for_a_scale_is_zero(tmp_path):
    data = encoded(np.full((1, 32), 1e-42, np.float32), GGMLQuantizationType.Q8_0)
    assert data == bytes(34)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_q8_0_of_other_numbers_is_that_of_their_float32(dtype):
    numbers = RNG.normal(size=(40, 64)).astype(dtype)
    expected = quants.quantize(numbers.astype(np.float32), GGMLQuantizationType.Q8_0)
    assert encoded(numbers, GGMLQuantizationType.Q8_0) == expected.tobytes()


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_narrow_floats_are_the_reference_s(name):
    numbers = np.clip(hard_numbers(), -6e4, 6e4)
    kind = GGMLQuantizationType[name]
    assert encoded(numbers, kind) == quants.quantize(numbers, kind).tobytes()


@pytest.mark.parametrize(("name", "number"), [("F16", 7e4), ("Q8_0", 1e7)])
def test_what_does_not_fit_is_no_silent_infinity(name, number):
    with pytest.raises(FloatingPointError):
        encoded(np.full((1, 32), number, np.float32), gguf.GGMLQuantizationType[name])
