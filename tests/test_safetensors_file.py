"""Our reader and writer beside the reference implementation, and on files that do not follow the format."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from xlathe.errors import CheckpointError
from xlathe.safetensors_file import Tensor, read_safetensors, write_safetensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.half": np.arange(4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 5), np.int8),
    "scalar": np.asarray(7, np.int64),
}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def file_of(header: Any, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_reference_wrote(tmp_path: Path) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / "x")
    found = read_safetensors(tmp_path / "x")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)


def test_the_reference_reads_what_we_wrote(tmp_path: Path) -> None:
    sizes: list[int] = []
    write_safetensors(tmp_path / "x", tensors(ARRAYS), sizes.append)
    assert sizes == [24, 8, 0, 8]
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_arrays_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", tensors(ARRAYS))
    array = read_safetensors(tmp_path / "x")["a"].read()
    assert not array.flags.owndata and not array.flags.writeable


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", tensors(ARRAYS))
    before = (tmp_path / "x").read_bytes()

    def full() -> np.ndarray:
        raise OSError("no space left")

    with pytest.raises(CheckpointError, match="no space left"):
        write_safetensors(tmp_path / "x", {"a": Tensor((2,), np.dtype(np.float32), full)})
    assert (tmp_path / "x").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes: too short"),
        ((1 << 30).to_bytes(8, "little") + b"{}", "says it has 1,073,741,824 bytes; expected at most 2"),
        (b"\xff" * 8, "says it has 18,446,744,073,709,551,615 bytes"),
        (file_of(b"{"), "no JSON"),
        (file_of(b"[" * 9999), "no JSON"),
        (file_of([1]), "no JSON object"),
        (file_of(b'{"a": {}, "a": {}}'), "'a' is there twice"),
        (file_of({"a": 3}), "'a': expected dtype, shape and data_offsets, found 3"),
        (file_of({"a": entry("F31")}, bytes(8)), "'a': unknown dtype 'F31'"),
        (file_of({"a": entry(["F32"])}, bytes(8)), "'a': unknown dtype"),
        (file_of({"a": entry(shape=[-2])}, bytes(8)), "'a': malformed shape"),
        (file_of({"a": entry(shape=[True, 2])}, bytes(8)), "'a': malformed shape"),
        (file_of({"a": entry(shape=[1 << 60, 1 << 60])}, bytes(8)), r"'a': F32 .* takes .* bytes, found 8"),
        (file_of({"a": entry(shape=[10**4000, 0])}, b""), "'a': malformed shape"),
        (file_of({"a": entry(end=1 << 60)}, bytes(8)), "'a' lies at 0 to 1,152,921,504,606,846,976 of 8 bytes"),
        (file_of({"a": entry(end=1 << 64)}, bytes(8)), r"'a': malformed shape .* or data_offsets \[0, 1844"),
        (file_of({"a" * 999: entry(end=9)}, bytes(8)), r"'aaa[a]*\.\.\. lies at 0 to 9 of 8 bytes"),
        (file_of({"a": entry(begin=8, end=0)}, bytes(8)), "'a' lies at 8 to 0"),
        (file_of({"a": entry()}, bytes(7)), "'a' lies at 0 to 8 of 7 bytes: truncated"),
        (file_of({"a": entry(shape=[3])}, bytes(8)), r"'a': F32 \[3\] takes 12 bytes, found 8"),
        (file_of({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "'b' overlaps 'a'"),
        (file_of({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "'b' leaves a hole after 'a'"),
        (file_of({"a": entry()}, bytes(9)), "expected 8 bytes of numbers, found 9"),
    ],
)
def test_malformed(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_safetensors(tmp_path / "x")
    assert str(tmp_path / "x") in str(raised.value) and len(str(raised.value)) < 500


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", tensors(ARRAYS))
    whole = (tmp_path / "x").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path / "x")


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 400), value=st.binary(min_size=1, max_size=8))
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x"
    write_safetensors(path, tensors(ARRAYS))
    whole = bytearray(path.read_bytes())
    place %= len(whole)
    whole[place : place + len(value)] = value[: len(whole) - place]
    path.write_bytes(whole)
    try:
        for tensor in read_safetensors(path).values():
            assert tensor.read().shape == tensor.shape
    except CheckpointError:
        pass


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' is complex128, which safetensors cannot hold"):
        write_safetensors(tmp_path / "x", tensors({"a": np.zeros(2, np.complex128)}))


def test_an_array_that_is_not_what_was_said_is_not_written(tmp_path: Path) -> None:
    """Its bytes would be read as something else."""
    wrong = {"x": Tensor((2,), np.dtype(np.float32), lambda: np.zeros(2))}
    with pytest.raises(CheckpointError, match=r"'x' is float32\[2\], and float64\[2\] was made"):
        write_safetensors(tmp_path / "x", wrong)
    assert not any(tmp_path.iterdir())
