"""A model as its files hold it: the one form that every file format is read into and written from."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from xlathe.card import Card
from xlathe.safetensors_file import Tensor


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights by their Hugging Face names, and what came with them.

    tensors: in the order of the files; matrices as `torch.nn.Linear` holds them, [outputs, inputs], rotary
    projections in Hugging Face's order of rows, an expert's weights one tensor each, whatever the file does.
    tokenizer: a `tokenizers.Tokenizer`, or None. where: the file or directory, for error messages. metadata: what a
    GGUF file says of its tokenizer and its origin, by full keys, which stays true in another type. notes: what was not
    read as it is stored, for the report.
    """

    card: Card
    tensors: Mapping[str, Tensor]
    where: str
    tokenizer: Any = None
    metadata: Mapping[str, Any] = types.MappingProxyType({})
    notes: tuple[str, ...] = ()
