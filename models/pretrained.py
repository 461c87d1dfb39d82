"""Graphs of pretrained models: the family's plain forward, traced from shapes, with weights that stay on disk."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlathe.errors import CheckpointError, OptionError, as_path
from xlathe.graph import Graph, Weights, is_shape
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.family import Family, find_family
from xlathe.models.formats.huggingface import read_huggingface
from xlathe.models.settings import Settings
from xlathe.trace import trace

LONGEST = 4096  # where nobody asks for more: tables and masks grow with it
FLOATS = ("float32", "bfloat16", "float16")


def from_pretrained(
    source: str | os.PathLike[str], *, max_len: int | None = None, dtype: str | None = None
) -> Graph:
    """Returns the graph of a pretrained model, with its tokenizer and card; weights are read when they are used.

    source: a directory with `config.json` and safetensors.
    max_len: the longest text to serve; `max_position_embeddings`, at most 4096, where it is None.
    dtype: "float32", "bfloat16" or "float16", of weights and activations; the files' own where it is None.

    Raises CheckpointError, naming file and tensor, for files that are damaged or incomplete and for unknown families
    and settings; OptionError for options that do not fit.
    """
    if dtype is not None and dtype not in FLOATS:
        raise OptionError(f"dtype: expected one of {', '.join(FLOATS)}, got {dtype!r}")
    return to_graph(read_huggingface(as_path(source, CheckpointError)), max_len=max_len, dtype=dtype)


def to_graph(checkpoint: Checkpoint, *, max_len: int | None = None, dtype: str | None = None) -> Graph:
    """Builds the family's forward and gives it the checkpoint's tensors; as `from_pretrained`."""
    settings = Settings(checkpoint.card.config, f"{checkpoint.where}: config.json")
    family = find_family(checkpoint.card.config, settings.where)
    trained = settings.size("max_position_embeddings", settings.size("n_positions", LONGEST))
    length = min(trained, LONGEST) if max_len is None else max_len
    if length > trained:
        raise OptionError(f"max_len={length}: {checkpoint.where} was trained with at most {trained} positions")
    module = nnx.eval_shape(lambda: family.build(settings, length, nnx.Rngs(0)))
    stored = _assign(family, module, checkpoint, dtype)
    graph = trace(_typed(module, stored), max_len=length, tokenizer=checkpoint.tokenizer)
    constants = {name: array for name, array in graph.weights.stored.items() if not is_shape(array)}
    weights = Weights(Stored(stored, constants))
    return graph.replace(weights=weights, card=checkpoint.card, history=())


@dataclasses.dataclass(frozen=True)
class Stored(Mapping[str, Any]):
    """The weights of a graph by our names, read from their files one at a time, and its constants."""

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.constants[name] if name in self.constants else self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        yield from self.tensors
        yield from self.constants

    def __len__(self) -> int:
        return len(self.tensors) + len(self.constants)


def _paths(module: nnx.Module) -> dict[str, Any]:
    """Returns the trained variables of a module by our names."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def _typed(module: nnx.Module, stored: Mapping[str, Tensor]) -> nnx.Module:
    """Returns the module with the dtypes that its weights have in the files."""
    definition, state = nnx.split(module)
    flat = [
        (path, variable.replace(jax.ShapeDtypeStruct(variable.get_value().shape, stored["/".join(map(str, path))].dtype))
         if isinstance(variable, nnx.Param) else variable)
        for path, variable in nnx.to_flat_state(state)
    ]  # fmt: skip
    return nnx.merge(definition, nnx.from_flat_state(flat))


def _assign(family: Family, module: nnx.Module, checkpoint: Checkpoint, dtype: str | None) -> dict[str, Tensor]:
    """Returns the tensors by our names, as our forward holds them; what is missing, surplus or misshapen is refused."""
    left = dict(checkpoint.tensors)
    assigned = {}
    for ours, aval in _paths(module).items():
        theirs = their_name(family, ours)
        if theirs not in left:
            raise CheckpointError(f"{checkpoint.where} has no tensor {theirs!r} {list(aval.shape)}")
        tensor = left.pop(theirs)
        turned = family.linear and ours.endswith("/kernel")
        assigned[ours] = _convert(tensor, turned, dtype)
        if assigned[ours].shape != aval.shape:
            expected = aval.shape[::-1] if turned else aval.shape
            raise CheckpointError(
                f"{checkpoint.where}: {theirs!r}: expected {list(expected)} by config.json, found {list(tensor.shape)}"
            )
    _check_surplus(family, left, checkpoint)
    return assigned


def their_name(family: Family, ours: str) -> str:
    """Returns a weight's name in Hugging Face's files."""
    numbers = [part for part in ours.split("/") if part.isdigit()]
    pattern = "/".join("*" if part.isdigit() else part for part in ours.split("/"))
    theirs = family.names[pattern]
    for number in numbers:
        theirs = theirs.replace("*", number, 1)
    return theirs


def _convert(tensor: Tensor, turned: bool, dtype: str | None) -> Tensor:
    wanted = np.dtype(jnp.dtype(dtype)) if dtype else tensor.dtype

    def read() -> np.ndarray:
        array = tensor.read().astype(wanted, copy=False)
        return array.T if turned else array

    return Tensor(tensor.shape[::-1] if turned else tensor.shape, wanted, read)


def _check_surplus(family: Family, left: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    surplus = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in family.ignored)]
    tied = checkpoint.card.config.get("tie_word_embeddings")
    if tied and "head/kernel" in family.names:  # some writers keep both copies of a tied matrix
        surplus = [name for name in surplus if name != family.names["head/kernel"]]
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise CheckpointError(f"{checkpoint.where}: {surplus[0]!r}{more}: no part of a {family.architecture}")
