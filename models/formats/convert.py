"""From any checkpoint to a file or directory of another format."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from xlathe.errors import CheckpointError, OptionError, as_path, did_you_mean
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.formats.checkpoints import open_checkpoint
from xlathe.models.formats.huggingface import write_huggingface

if TYPE_CHECKING:
    from xlathe.models.formats.gguf import Plan

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
Progress = Callable[[int, int], None]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    type: str | None = None,
    progress: Progress = lambda done, total: None,
    imatrix: str | os.PathLike[str] | None = None,
    planned: Callable[["Plan"], None] = lambda plan: None,
) -> int:
    """Writes what `source` holds to `destination`, a GGUF file where its name ends so, else a Hugging Face directory.

    type: of the numbers, F32, F16, BF16 or (GGUF) a name in `gguf.mixes.MIXES`; by default Q8_0 in a GGUF file, and
    the source's own in a directory. progress: told the bytes written and the bytes in all. imatrix: an importance
    matrix of llama.cpp's, for a GGUF file. planned: told what a GGUF file will hold before any of it is written.
    Returns the bytes in all. Raises CheckpointError for a source that is damaged, holds NaN or infinite numbers or has
    no place in the other format, OptionError for an unknown type.
    """
    checkpoint, path = open_checkpoint(source), as_path(destination, CheckpointError)
    if path.exists() and path.resolve() == Path(source).resolve():
        raise CheckpointError(f"{path}: expected another place than the source's, which is read while writing")
    if path.suffix != ".gguf":
        if imatrix is not None:
            raise OptionError(f"imatrix: a directory has no use for one; expected a .gguf file, found {path}")
        return _to_huggingface(checkpoint, path, type, progress)
    from xlathe.models.formats.gguf import plan_gguf, read_importance, write_plan  # they import the package gguf

    importance = None if imatrix is None else read_importance(imatrix)
    plan = plan_gguf(checkpoint, type or "Q8_0", checkpoint.metadata, importance)
    planned(plan)
    write_plan(plan, path, progress)
    return plan.size


def _to_huggingface(checkpoint: Checkpoint, folder: Path, type: str | None, progress: Progress) -> int:
    if type is not None and type not in DTYPES:
        raise OptionError(f"type: no type {type!r} in a directory{did_you_mean(type, DTYPES)}")
    return write_directory(_cast(checkpoint, None if type is None else DTYPES[type]), folder, progress)


def write_directory(checkpoint: Checkpoint, folder: Path, progress: Progress) -> int:
    """Writes a Hugging Face directory; returns the bytes of its numbers. progress: told those written, and all."""
    whole = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    done = 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        progress(done, whole)

    write_huggingface(checkpoint, folder, wrote)
    return whole


def _cast(checkpoint: Checkpoint, dtype: np.dtype[Any] | None) -> Checkpoint:
    """Returns the checkpoint with floats of another type, if one is given.

    Raises CheckpointError when a number is read that does not fit, or is none.
    """

    def changed(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype or tensor.dtype

        def read() -> np.ndarray:
            array = tensor.read()
            if not np.isfinite(array).all():
                raise CheckpointError(f"tensor {name!r}: expected numbers, found NaN or infinite ones")
            try:
                with np.errstate(over="raise"):
                    return array.astype(wanted, copy=False)
            except FloatingPointError:
                raise CheckpointError(f"tensor {name!r}: expected numbers that fit {wanted}, found larger") from None

        return Tensor(tensor.shape, wanted, read)

    tensors = {name: changed(name, tensor) for name, tensor in checkpoint.tensors.items()}
    said = {} if dtype is None else {"dtype": str(dtype)}
    card = dataclasses.replace(checkpoint.card, config={**checkpoint.card.config, **said})
    return dataclasses.replace(checkpoint, card=card, tensors=tensors)
