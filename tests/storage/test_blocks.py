"""Blocks of GGUF files as a storage format, beside the decoders of the package gguf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

from xlathe.errors import OptionError
from xlathe.kernels.gguf_blocks import reference
from xlathe.storage import Blocks, parse_format, take_lines
from xlathe.storage.block_values import VALUES


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Every byte any value, but that scales are finite: uint8 [rows, blocks * bytes]."""
    rng, size = np.random.default_rng(seed), Blocks(name).layout.bytes
    found = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in Blocks(name).layout.halves:
        halves = (rng.standard_normal((rows, blocks)) * 2.0 ** rng.integers(-20, 12, (rows, blocks))).astype("<f2")
        found[..., at : at + 2] = halves[..., None].view(np.uint8)
    return found.reshape(rows, -1)


def by_gguf(name: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[name.upper()])


@pytest.mark.parametrize("name", VALUES)
def test_all_bytes_are_what_gguf_makes_of_them(name: str) -> None:
    """64 blocks of random bytes a row have every byte in nearly every place; scales from denormal ones to 2**13."""
    blocks = random_blocks(name, rows=33, blocks=64)
    expected = by_gguf(name, blocks)
    found = jax.jit(Blocks(name).dequantize)(jnp.asarray(blocks))
    np.testing.assert_array_equal(found, expected)
    index = jnp.array([[5, 0], [32, 5]])
    rows = jax.jit(lambda *parts: Blocks(name).decode(*take_lines(Blocks(name), index, *parts)))(jnp.asarray(blocks))
    np.testing.assert_array_equal(rows, expected[np.asarray(index)])


@pytest.mark.parametrize("name", VALUES)
def test_the_bytes_are_those_of_files(name: str) -> None:
    stored, rng = parse_format(name), np.random.default_rng(1)
    assert isinstance(stored, Blocks) and str(stored) == name
    w, importance = rng.standard_normal((5, 512)).astype(np.float32), rng.chisquare(1, 512).astype(np.float32)
    for weights in (None, importance):
        (blocks,) = stored.encode(w, weights)
        np.testing.assert_array_equal(blocks, reference.encode(w, name.upper(), weights))
    (part,) = stored.parts(5, 512).values()
    assert blocks.shape == part.shape and blocks.dtype == part.dtype
    assert stored.bits(5, 512) == 8 * blocks.nbytes / w.size


def test_the_reference_s_bytes_can_be_written_to_a_file() -> None:
    """Also where a row is one block."""
    assert memoryview(reference.encode(np.ones((3, 256), np.float32), "Q6_K")).c_contiguous


def test_what_does_not_fit() -> None:
    assert parse_format("q4_k").misfit(3, 512) is None and parse_format("q4_0").misfit(3, 96) is None
    reason = parse_format("q4_k").misfit(3, 288)
    assert reason == "blocks of 256 do not fill 288; q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl would"
    assert parse_format("q8_0").misfit(3, 40) == "blocks of 32 do not fill 40; no type of blocks would"
    with pytest.raises(OptionError, match="q4_k has no options"):
        parse_format("q4_k:g32")
    with pytest.raises(OptionError, match="'q4_m' is not known; did you mean 'q4_"):
        parse_format("q4_m")
