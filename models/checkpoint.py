"""A model as its files hold it: the one form that every file format is read into and written from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xlathe.card import Card


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a checkpoint, read when it is asked for.

    shape: outermost axis first; dtype: as NumPy (with ml_dtypes) names it, also where the file holds blocks of codes;
    read: returns the array, a view of the mapped file where the file holds plain numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights by their Hugging Face names, and what came with them.

    tensors: in the order of the files; matrices as `torch.nn.Linear` holds them, [outputs, inputs], rotary
    projections in Hugging Face's order of rows, an expert's weights one tensor each, whatever the file does.
    tokenizer: a `tokenizers.Tokenizer`, or None. where: the file or directory, for error messages.
    """

    card: Card
    tensors: Mapping[str, Tensor]
    where: str
    tokenizer: Any = None
