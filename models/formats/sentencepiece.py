"""`tokenizer.model`: SentencePiece's protocol buffer (`sentencepiece_model.proto`), read without its library."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from xlathe.errors import CheckpointError
from xlathe.models.formats.pieces import NORMAL, UNKNOWN, Pieces, bpe, unigram

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
UNIGRAM, BPE = 1, 2
Field = int | bytes


def read_sentencepiece(path: Path) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece file of the type BPE or Unigram.

    Raises CheckpointError for a file that is damaged or of another type.
    """
    try:
        kind, pieces = _model(path.read_bytes())
        if kind not in (UNIGRAM, BPE):
            raise ValueError(f"expected a model of the type unigram or BPE, found type {kind}")
        if len(set(pieces.texts)) != len(pieces.texts) or not pieces.texts:
            raise ValueError("expected pieces that differ, found none or some twice")
        return bpe(pieces) if kind == BPE else unigram(pieces)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # ours above, and what the library raises for pieces that make no model
        raise CheckpointError(f"{path} is no SentencePiece model: {error}") from None


def _model(data: bytes) -> tuple[int, Pieces]:
    texts, scores, kinds = [], [], []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for number, value in _fields(data):
        if number == 1:
            text, score, piece_kind = _piece(_bytes(value))
            texts.append(text)
            scores.append(score)
            kinds.append(piece_kind)
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if UNKNOWN not in kinds:
        raise ValueError("expected an unknown piece, found none")
    pieces = Pieces(
        texts,
        scores,
        kinds,
        prefix=bool(normalizer.get(3, 1)),
        trim=bool(normalizer.get(4, 1)),
        charsmap=_bytes(normalizer.get(2, b"")),
    )
    return int(trainer.get(3, UNIGRAM)), pieces


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    kind = fields.get(3, NORMAL)
    if not isinstance(kind, int) or not NORMAL <= kind <= 6 or not math.isfinite(score):
        raise ValueError(f"a piece has the score {score} and the type {kind!r}")
    return _bytes(fields.get(1, b"")).decode(), score, kind


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Yields numbers and values of a message: integers, or the bytes of everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire)
        if wire == BYTES:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"byte {at}: a field of {size} bytes and the wire type {wire}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"byte {at}: no whole number")


def _bytes(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"expected bytes, found the number {value}")
    return value
