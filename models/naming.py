"""Weights by our names and by Hugging Face's: what a checkpoint gives to a forward, and takes back from a graph."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.family import Family
from xlathe.models.resize import Shapes
from xlathe.models.settings import Settings


def their_name(family: Family, ours: str) -> str:
    """Returns a weight's name in Hugging Face's files."""
    parts = ours.split("/")
    theirs = family.names["/".join("*" if part.isdigit() else part for part in parts)]
    for number in filter(str.isdigit, parts):
        theirs = theirs.replace("*", number, 1)
    return theirs


def is_turned(family: Family, ours: str) -> bool:
    """Says whether files hold the transpose of a weight."""
    return ours == "head/kernel" or (family.linear and ours.endswith("/kernel"))


def assign(
    family: Family, shapes: Shapes, checkpoint: Checkpoint, dtype: str | None, finite: bool
) -> dict[str, Tensor]:
    """Returns the tensors that a forward with weights of these shapes takes, by our names, as it holds them.

    dtype: what they are converted to when they are read, if anything; finite: whether NaN and infinity are refused
        then.
    Raises CheckpointError for a tensor that is missing, surplus or of another shape.
    """
    left, assigned = dict(checkpoint.tensors), {}
    for ours, shape in shapes.items():
        turned, theirs = is_turned(family, ours), _present(their_name(family, ours), left, checkpoint.card.config)
        if theirs is None:
            raise CheckpointError(f"{checkpoint.where} has no tensor {their_name(family, ours)!r} {list(shape)}")
        expected = shape[::-1] if turned else shape
        tensor = left.pop(theirs)
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"{checkpoint.where}: {theirs!r}: expected float32, bfloat16, float16 or float64, found {tensor.dtype}"
            )
        if tensor.shape != expected:
            raise CheckpointError(
                f"{checkpoint.where}: {theirs!r}: expected {list(expected)} by its configuration, found "
                f"{list(tensor.shape)}"
            )
        checked = _finite(tensor, f"{checkpoint.where}: {theirs!r}") if finite else tensor
        assigned[ours] = _convert(checked, turned, dtype)
    _check_surplus(family, left, checkpoint)
    return assigned


def _present(theirs: str, left: Mapping[str, Tensor], config: Mapping[str, Any]) -> str | None:
    """Returns the name, or the one in a file that was saved without the head of the model around it, or with one."""
    without, within = theirs.partition(".")[2], f"{config.get('model_type')}.{theirs}"
    return next((name for name in (theirs, without, within) if name in left), None)


def _convert(tensor: Tensor, turned: bool, dtype: str | None) -> Tensor:
    """What is packed stays so: its parts are of the matrix as files hold it, [outputs, inputs]."""
    wanted = np.dtype(jnp.dtype(dtype)) if dtype else tensor.dtype

    def read() -> np.ndarray:
        array = tensor.read().astype(wanted, copy=False)
        return array.T if turned else array

    return Tensor(tensor.shape[::-1] if turned else tensor.shape, wanted, read, tensor.packed)


def _finite(tensor: Tensor, what: str) -> Tensor:
    """Returns a tensor that refuses NaN and infinity when it is read; of one that is packed, its parts do."""

    def read() -> np.ndarray:
        array = tensor.read()
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise CheckpointError(f"{what} holds {bad:,} numbers that are NaN or infinite; allow_nan=True takes them")
        return array

    packed = tensor.packed
    if packed is not None:
        parts = {part: _finite(each, f"{what} ({part})") for part, each in packed.parts.items()}
        packed = dataclasses.replace(packed, parts=parts)
    return Tensor(tensor.shape, tensor.dtype, read, packed)


def _check_surplus(family: Family, left: Iterable[str], checkpoint: Checkpoint) -> None:
    config = checkpoint.card.config
    known = [*family.ignored, *map(re.escape, _copies(family, config)), *_drafting(config)]
    surplus = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in known)]
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise CheckpointError(f"{checkpoint.where}: {surplus[0]!r}{more}: no part of a {family.architecture}")


def _copies(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Some writers keep both copies of a tied matrix."""
    head = family.names.get("head/kernel")
    return [head] if head and config.get("tie_word_embeddings", True) else []


def _drafting(config: Mapping[str, Any]) -> list[str]:
    """Layers after the last one predict further tokens, in training and to draft with (DeepSeek-V3)."""
    settings = Settings(config)
    last, more = settings.count("num_hidden_layers", 0), settings.count("num_nextn_predict_layers", 0)
    return [rf"model\.layers\.{last + i}\..*" for i in range(more)]
