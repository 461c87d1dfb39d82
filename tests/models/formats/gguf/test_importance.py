"""Importance matrices, in files written out byte by byte, and by the package gguf."""

import struct

import gguf
import numpy as np
import pytest

from tests.models.formats import families
from xlathe.errors import CheckpointError, OptionError
from xlathe.models.formats.convert import convert
from xlathe.models.formats.gguf import plan_gguf, read_importance, write_gguf, write_plan
from xlathe.models.formats.gguf.container import open_container

SUMS = {"blk.0.attn_q.weight": np.arange(1, 65, dtype=np.float32)[None], "blk.1.ffn_down_exps.weight": np.ones((3, 4))}
COUNTS = {"blk.0.attn_q.weight": [4], "blk.1.ffn_down_exps.weight": [2, 0, 8]}


def write_imatrix(path, sums, counts):
    """Writes what llama.cpp's `imatrix` does."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in sums.items():
        writer.add_tensor(name + ".in_sum2", np.asarray(values, np.float32))
        writer.add_tensor(name + ".counts", np.asarray(counts[name], np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sums_over_counts_and_ones_where_nothing_came(tmp_path):
    found = read_importance(write_imatrix(tmp_path / "i.gguf", SUMS, COUNTS))
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], SUMS["blk.0.attn_q.weight"] / 4)
    expected = [[0.5] * 4, [1] * 4, [0.125] * 4]
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"], expected)


def dat(name: bytes = b"blk.0.attn_q.weight", calls: int = 2, values: int = 3) -> bytes:
    head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", calls, values)
    return head + np.arange(3, dtype="<f4").tobytes() + struct.pack("<ii", 7, 4) + b"text"


def test_the_older_file_is_read(tmp_path):
    (tmp_path / "i.dat").write_bytes(dat())
    np.testing.assert_array_equal(read_importance(tmp_path / "i.dat")["blk.0.attn_q.weight"], [[0, 0.5, 1]])


@pytest.mark.parametrize("content", [b"", dat()[:10], dat()[:40], dat(values=-1), dat(values=1 << 30), b"\xff" * 64])
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "i.dat").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected an importance matrix|expected sums of squares"):
        read_importance(tmp_path / "i.dat")


def test_numbers_that_are_no_weights_are_refused(tmp_path):
    for bad in (-1, np.nan, np.inf):
        path = write_imatrix(
            tmp_path / f"{bad}.gguf", {"blk.0.attn_q.weight": [[1, bad]]}, {"blk.0.attn_q.weight": [1]}
        )
        with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight': expected finite weights >= 0"):
            read_importance(path)
    with pytest.raises(CheckpointError, match="expected an importance matrix: No such file"):
        read_importance(tmp_path / "nowhere")


def test_importance_changes_what_it_weighs_and_nothing_else(tmp_path):
    checkpoint = families.load("llama")
    plain = plan_gguf(checkpoint, "Q4_K_M")
    name = "blk.0.attn_q.weight"
    importance = {name: np.linspace(0, 1, 64, dtype=np.float32)[None]}
    weighed = plan_gguf(checkpoint, "Q4_K_M", importance=importance)
    for plan, path in ((plain, "a.gguf"), (weighed, "b.gguf")):
        write_plan(plan, tmp_path / path)
    a, b = (open_container(tmp_path / path) for path in ("a.gguf", "b.gguf"))
    assert [n for n in a.entries if not np.array_equal(a.bytes_of(a.entries[n]), b.bytes_of(b.entries[n]))] == [name]


def test_importance_that_fits_nothing_is_refused(tmp_path):
    checkpoint = families.load("llama")
    with pytest.raises(CheckpointError, match=r"expected names such as .*, found 'model.layers.0'"):
        plan_gguf(checkpoint, "Q4_K_M", importance={"model.layers.0": np.ones((1, 64), np.float32)})
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight': expected 64 weights, found 63"):
        plan_gguf(checkpoint, "Q4_K_M", importance={"blk.0.attn_q.weight": np.ones((1, 63), np.float32)})
    write_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    with pytest.raises(OptionError, match="a directory has no use for one"):
        convert(tmp_path / "m.gguf", tmp_path / "out", imatrix=tmp_path / "i.gguf")
