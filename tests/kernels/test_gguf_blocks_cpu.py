"""Encoders of GGUF's blocks: kernel and NumPy beside hashes of llama.cpp's own bytes, and beside each other."""

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

from tests.kernels import gguf_blocks_cases as cases
from tests.kernels.make_gguf_blocks_expected import EXPECTED, digest
from tests.kernels.make_gguf_blocks_expected import encode as llama_cpp
from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.gguf_blocks import cpu, reference
from xlathe.kernels.gguf_blocks.layouts import LAYOUTS

ISAS = native.available_isas() if native.library() else ()
KNOWN = json.loads(EXPECTED.read_text())
WEIGHTS = {"plain": None, "importance": cases.importance()}
ENCODERS = {"reference": reference.encode, "kernel": cpu.encode}


def test_the_rows_are_those_that_the_peer_was_given():
    assert digest(cases.rows()) + digest(cases.importance()) == KNOWN["input"]


@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("type", LAYOUTS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_bytes_are_llama_cpp_s(encoder, type, way):
    assert digest(ENCODERS[encoder](cases.rows(), type, WEIGHTS[way])) == KNOWN["blocks"][type][way]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="not installed: pip install .[llama]")
@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("type", LAYOUTS)
def test_bytes_of_other_rows_are_those_of_llama_cpp_as_installed(type, way):
    x = cases.bell(20, 64, 768) ** 3 * np.exp2(cases.bell(21, 64, 1) * 8)
    np.testing.assert_array_equal(cpu.encode(x, type, WEIGHTS[way]), llama_cpp(x, type, WEIGHTS[way]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", LAYOUTS)
def test_every_instruction_set_writes_the_same_bytes(type, isa):
    x = cases.rows()[::3]
    for weights in WEIGHTS.values():
        np.testing.assert_array_equal(cpu.encode(x, type, weights, isa), cpu.encode(x, type, weights))


@pytest.mark.parametrize("type", LAYOUTS)
def test_a_row_has_its_bytes_in_any_company(type):
    """Before: fewer blocks than a register has lanes, more than a task has. Expected: the same bytes of each row."""
    numbers = LAYOUTS[type].numbers
    x = np.concatenate([cases.rows()[:8]] * 14)[:, : 3 * numbers]
    for weights in (None, cases.importance()[: 3 * numbers]):
        together = cpu.encode(x, type, weights)
        for row in (0, 7, 103):
            np.testing.assert_array_equal(cpu.encode(x[row : row + 1], type, weights), together[row : row + 1])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K"])
def test_narrow_numbers_are_encoded_as_their_float32(type, dtype):
    x = cases.rows()[:80].astype(dtype)  # among them denormal float16
    expected = cpu.encode(x.astype(np.float32), type)
    for encode in ENCODERS.values():
        np.testing.assert_array_equal(encode(x, type), expected)


# Root of the mean square of what is lost, over that of the numbers, of a normal distribution: a code of b bits has at
# best a step of 3.6 / 2^b deviations or so; the types with a float16 a block of 32 lose more than those of 256.
LOST = {"Q8_0": 0.006, "Q6_K": 0.021, "Q5_K": 0.041, "Q5_1": 0.047, "Q5_0": 0.052, "Q4_K": 0.08, "Q4_1": 0.095,
        "IQ4_XS": 0.09, "IQ4_NL": 0.085, "Q4_0": 0.105, "Q3_K": 0.18, "Q2_K": 0.32}  # fmt: skip


@pytest.mark.parametrize("type", LAYOUTS)
def test_decoded_by_the_package_gguf_the_numbers_are_back(type):
    x = cases.bell(30, 64, 768)
    decoded = quants.dequantize(cpu.encode(x, type), GGMLQuantizationType[type])
    assert np.sqrt(np.square(decoded - x).mean() / np.square(x).mean()) < LOST[type]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("type", LAYOUTS)
def test_what_blocks_cannot_hold_is_refused(type, encoder):
    for number, message in ((np.nan, "finite"), (-np.inf, "finite"), (1e30, f"fit {type}, found larger")):
        x = cases.bell(40, 4, 768)
        x[2, 300] = number
        with pytest.raises(FloatingPointError, match=message):
            ENCODERS[encoder](x, type)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match=r"Q4_K: expected \[rows, a multiple of 256\], found \[2, 320\]"):
        cpu.encode(np.zeros((2, 320), np.float32), "Q4_K")
    with pytest.raises(OptionError, match=r"found \[2, 256\] and importance \[255\]"):
        cpu.encode(np.zeros((2, 256), np.float32), "Q4_K", np.zeros(255, np.float32))
