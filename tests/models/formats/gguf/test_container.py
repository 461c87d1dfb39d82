"""The reader of the container: sound files of another writer, and every way in which a file can be wrong."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.models.formats.gguf.build import HEADER, file, info, pair, small, string, write
from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf.blocks import as_tensor
from xlathe.models.formats.gguf.container import open_container

RNG = np.random.default_rng(0)


def opened(folder: Path, content: bytes):
    return open_container(write(folder, content))


def test_a_file_of_llama_cpp_s_writer_is_read_to_equal_values(tmp_path):
    path = tmp_path / "made.gguf"
    arrays = {f"t{i}": RNG.normal(size=(3, i + 1, 64)).astype(t) for i, t in enumerate((np.float32, np.float16))}
    writer = gguf.GGUFWriter(path, "llama")
    scalars = {
        "u8": 200, "i8": -100, "u16": 60000, "i16": -30000, "u32": 4 * 10**9, "i32": -(10**9),
        "u64": 2**63, "i64": -(2**62), "f32": 0.5, "f64": 0.1, "flag": True, "text": "größer",
    }  # fmt: skip
    for name, add in {
        "u8": writer.add_uint8, "i8": writer.add_int8, "u16": writer.add_uint16, "i16": writer.add_int16,
        "u32": writer.add_uint32, "i32": writer.add_int32, "u64": writer.add_uint64, "i64": writer.add_int64,
        "f32": writer.add_float32, "f64": writer.add_float64, "flag": writer.add_bool, "text": writer.add_string,
    }.items():  # fmt: skip
        add(name, scalars[name])
    writer.add_array("words", ["a", "", "ü"])
    writer.add_array("numbers", [1.5, -2.5])
    writer.add_custom_alignment(64)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = open_container(path)
    assert {name: found.metadata[name] for name in scalars} == scalars
    assert found.metadata["words"] == ["a", "", "ü"]
    np.testing.assert_array_equal(found.metadata["numbers"], np.array([1.5, -2.5], np.float32))
    assert list(found.entries) == list(arrays)
    for name, expected in arrays.items():
        tensor = as_tensor(found, found.entries[name])
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(tensor.read(), expected)


def test_plain_tensors_are_views_of_the_file(tmp_path):
    found = opened(tmp_path, small())
    array = as_tensor(found, found.entries["two"]).read()
    assert np.shares_memory(array, found.data) and not array.flags.writeable
    np.testing.assert_array_equal(array, [0, 1, 2])
    np.testing.assert_array_equal(found.metadata["nested"][0], [5, 6])


def test_every_truncation_is_refused_by_name(tmp_path):
    content = small()
    for size in range(len(content)):
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            opened(tmp_path, content[:size])


WRONG = {
    "begins with": b"GGML" + bytes(20),
    "version 2": file([], [], version=2),
    "version 1": file([], [], version=1),
    "a big-endian file of version 3": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "number of tensors": HEADER.pack(b"GGUF", 3, 2**64 - 1, 0),
    "number of keys": HEADER.pack(b"GGUF", 3, 0, 2**63),
    "key 'k' at byte": file([pair("k", 4, bytes(4)), pair("k", 4, bytes(4))], []),
    "type of key 'k'": file([pair("k", 13, bytes(8))], []),
    "expected booleans": file([pair("k", 7, b"\2")], []),
    "expected UTF-8": file([pair("k", 8, string(b"\xff"))], []),
    "length of key 'k'": file([pair("k", 8, bytes(4))], [], align=1),
    "item 1 of key 'k'": file([pair("k", 9, struct.pack("<IQ", 8, 2) + string("12345678") + bytes(4))], [], align=1),
    "18446744073709551615 bytes": file([pair("k", 8, struct.pack("<Q", 2**64 - 1))], []),
    "36893488147419103230 bytes": file([pair("k", 9, struct.pack("<IQ", 2, 2**64 - 1))], []),
    "items of at least 8 bytes": file([pair("k", 9, struct.pack("<IQ", 8, 2**61))], []),
    "items of at least 12 bytes": file([pair("k", 9, struct.pack("<IQ", 9, 2**61))], []),
    "arrays at most 8 deep": file([pair("k", 9, struct.pack("<IQ", 9, 1) * 5000)], []),
    "a power of two, found 0": file([pair("general.alignment", 4, bytes(4))], []),
    "a power of two, found 48": file([pair("general.alignment", 4, struct.pack("<I", 48))], []),
    "a power of two, found '32'": file([pair("general.alignment", 8, string("32"))], []),
    "number of axes of tensor 'w'": file([], [info("w", (1, 1, 1, 1, 1), 0, 0)], bytes(32)),
    "type of tensor 'w'": file([], [info("w", (1,), 4, 0)], bytes(32)),
    "no empty axis": file([], [info("w", (0, 2**62), 0, 0)], bytes(32)),
    "whole blocks of 32": file([], [info("w", (16, 2), 8, 0)], bytes(64)),
    "a multiple of 32, found 8": file([], [info("w", (1,), 0, 8)], bytes(64)),
    "from byte": file([], [info("w", (2**62, 2, 2, 2), 0, 0)], bytes(32)),
    "found a file of": file([], [info("w", (8,), 0, 2**64 - 32)], bytes(32)),
    "'v' and 'w' overlap": file([], [info("v", (9,), 0, 0), info("w", (1,), 0, 32)], bytes(64)),
    "tensor 'w' is there more than once": file([], [info("w", (1,), 0, 0), info("w", (1,), 0, 32)], bytes(64)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(message, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, WRONG[message])
    assert message in str(caught.value) and "model.gguf" in str(caught.value)


def test_strings_of_a_hostile_file_are_counted(tmp_path):
    count = (1 << 21) + 1
    content = file([pair("k", 9, struct.pack("<IQ", 8, count) + bytes(8 * count))], [])
    with pytest.raises(CheckpointError, match="at most 2097152 strings"):
        opened(tmp_path, content)


@pytest.mark.parametrize("path", ["absent.gguf", ".", None])
def test_what_is_no_file_is_refused(path, tmp_path):
    with pytest.raises(CheckpointError):
        open_container(path if path is None else tmp_path / path)
