"""Graphs of pretrained models: the family's plain forward, traced from shapes, with weights that stay on disk."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from xlathe.errors import OptionError, did_you_mean
from xlathe.graph import Graph, Weights, is_shape
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.family import find_family
from xlathe.models.formats.checkpoints import open_checkpoint
from xlathe.models.naming import assign
from xlathe.models.settings import Settings
from xlathe.safetensors_file import Packed
from xlathe.trace import trace

LONGEST = 4096  # where nobody asks for more: tables and masks grow with it
COUNTS = (
    *("num_hidden_layers", "n_layer", "num_nextn_predict_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
FLOATS = ("float32", "bfloat16", "float16")


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    max_len: int | None = None,
    dtype: str | None = None,
    allow_nan: bool = False,
    packed: bool = True,
    activations: str | None = None,
) -> Graph:
    """Returns the graph of a pretrained model, with its tokenizer and card; weights are read when they are used.

    source: a directory with `config.json` and safetensors, the name of one on the hub ("org/name"), which takes the
        package `huggingface_hub`, or a GGUF file.
    max_len: the longest text to serve; `max_position_embeddings`, at most 4096, where it is None.
    dtype: "float32", "bfloat16" or "float16", of weights and activations; the files' own where it is None.
    allow_nan: whether a weight may hold NaN or infinity; otherwise whoever reads one gets a CheckpointError.
    packed: whether weights that a file holds in a storage format (a GGUF file's blocks, codes and scales) are kept as
        they are wherever they are multiplied or looked up; otherwise all are floats, which passes can change.
    activations: how those are rounded that such weights are multiplied with, "int8" and so on
        (`xlathe.ops.activations`); as the file says where it is None, and a GGUF file says nothing. llama.cpp rounds
        them nearly as "int8" does: its steps are float16.

    Raises CheckpointError, naming file and tensor, for files that are damaged or incomplete and for unknown families
    and settings; OptionError for options that do not fit.
    """
    if dtype is not None and dtype not in FLOATS:
        raise OptionError(f"dtype: expected one of {', '.join(FLOATS)}, got {dtype!r}")
    checkpoint = open_checkpoint(source)
    return to_graph(
        checkpoint, max_len=max_len, dtype=dtype, allow_nan=allow_nan, packed=packed, activations=activations
    )


def to_graph(
    checkpoint: Checkpoint,
    *,
    max_len: int | None = None,
    dtype: str | None = None,
    allow_nan: bool = False,
    packed: bool = True,
    activations: str | None = None,
) -> Graph:
    """Builds the family's forward and gives it the checkpoint's tensors; as `from_pretrained`."""
    settings = Settings(checkpoint.card.config, f"{checkpoint.where}: config.json")
    family = find_family(checkpoint.card.config, settings.where)
    _check_settings(settings, len(checkpoint.tensors))
    if dtype is None and (checkpoint.notes or any(tensor.packed for tensor in checkpoint.tensors.values())):
        dtype = _said_dtype(settings)
    length = _length(settings, max_len)
    module = nnx.eval_shape(lambda: family.build(settings, length, nnx.Rngs(0)))
    shapes = weight_shapes(module)
    tensors = assign(family, shapes, checkpoint, dtype, finite=not allow_nan)
    typed = _typed(module, tensors)
    graph = trace(typed, max_len=length, tokenizer=checkpoint.tokenizer, arguments=family.arguments)
    constants = {name: array for name, array in graph.weights.stored.items() if not is_shape(array)}
    stored = Stored(tensors, constants)
    graph = graph.replace(weights=Weights(stored), card=checkpoint.card, history=())
    kept = {name: tensor.packed for name, tensor in tensors.items() if packed and tensor.packed is not None}
    if activations is not None:
        kept = _rounding(kept, activations)
    return _with_packed(graph, stored, kept, checkpoint.notes) if kept or checkpoint.notes else graph


def _rounding(packed: Mapping[str, Packed], activations: str) -> dict[str, Packed]:
    """Returns packed weights that are multiplied with activations which are rounded so.

    Steps that a file has, which are of how it rounds them, are left out. Raises OptionError where none is packed, or
    activations are unknown or none that they go with.
    """
    from xlathe.ops.activations import ACTIVATIONS
    from xlathe.passes.quantize.schemes import Scheme

    if activations not in ACTIVATIONS:
        raise OptionError(f"activations {activations!r} is not known{did_you_mean(str(activations), ACTIVATIONS)}")
    if not packed or activations.endswith("_static"):
        why = "its steps come from calibration" if packed else "no weight is packed"
        raise OptionError(f"activations={activations!r}: expected packed weights and no static steps; {why}")
    rounding = {}
    for name, matrix in packed.items():
        parts = {part: tensor for part, tensor in matrix.parts.items() if part != "input"}
        rounding[name] = Packed(matrix.format, parts, activations)
    for scheme in {matrix.scheme for matrix in rounding.values()}:
        Scheme.parse(scheme)
    return rounding


def _with_packed(graph: Graph, stored: "Stored", packed: Mapping[str, Packed], notes: tuple[str, ...]) -> Graph:
    """Returns the graph with weights as the files pack them; its history says which, and what is not."""
    from xlathe.passes.quantize.packed import keep_packed

    kept = keep_packed(graph, packed, notes)
    replaced = {origin.name for origin in kept.origins}
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in replaced}
    weights = Weights(Stored({**tensors, **kept.tensors}, stored.constants), origins=kept.origins)
    return kept.graph.replace(weights=weights, history=(kept.record,))


def _check_settings(settings: Settings, tensors: int) -> None:
    """Refuses counts by which a forward would be built before its tensors are looked at."""
    for name in COUNTS:
        if settings.has(name) and settings.count(name) > tensors:
            raise settings.wrong(name, f"at most as many as there are tensors, {tensors}", settings.values[name])


def _said_dtype(settings: Settings) -> str | None:
    """Returns the type that a model with packed weights computes in, which their files do not show."""
    said = settings.values.get("dtype", settings.values.get("torch_dtype"))
    return said if said in FLOATS else None


def _length(settings: Settings, asked: int | None) -> int:
    trained = settings.size("max_position_embeddings", settings.size("n_positions", LONGEST))
    if asked is not None and (type(asked) is not int or asked < 1):
        raise OptionError(f"max_len: expected a whole number of at least 1, got {asked!r}")
    if asked is not None and asked > trained:
        raise OptionError(f"max_len={asked}: {settings.where} says that it has {trained} positions")
    return min(trained, LONGEST) if asked is None else asked


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


def weight_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's weights by our names."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {_name(path): tuple(variable.get_value().shape) for path, variable in flat}


def _name(path: Any) -> str:
    return "/".join(map(str, path))


def _typed(module: nnx.Module, tensors: Mapping[str, Tensor]) -> nnx.Module:
    """Returns the module with weights of the dtypes that the tensors have."""
    definition, state = nnx.split(module)

    def typed(path: Any, variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        tensor = tensors[_name(path)]
        return variable.replace(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))

    flat = [(path, typed(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(definition, nnx.from_flat_state(flat))
