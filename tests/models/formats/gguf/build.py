"""GGUF files written out byte by byte from the specification, so that each byte can be made wrong."""

import struct
from pathlib import Path

import numpy as np

HEADER = struct.Struct("<4sIQQ")


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """dims: innermost first, as in the file."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(pairs: list[bytes], infos: list[bytes], data: bytes = b"", version: int = 3, align: int = 32) -> bytes:
    head = HEADER.pack(b"GGUF", version, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


def small() -> bytes:
    """A sound file with values of several types and two tensors."""
    pairs = [
        pair("general.architecture", 8, string("llama")),
        pair("a.number", 4, struct.pack("<I", 7)),
        pair("a.flag", 7, b"\1"),
        pair("some.strings", 9, struct.pack("<IQ", 8, 2) + string("x") + string("yz")),
        pair("some.floats", 9, struct.pack("<IQ", 6, 3) + struct.pack("<3f", 1, 2, 3)),
        pair("nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 2) + b"\5\6"),
    ]
    infos = [info("one", (32, 2), 8, 0), info("two", (3,), 0, 96)]
    return file(pairs, infos, bytes(range(68)) + bytes(28) + np.arange(3, dtype="<f4").tobytes())


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path
