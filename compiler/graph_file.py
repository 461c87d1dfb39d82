"""Graphs on disk: `graph.py` (the printed program), `weights.safetensors` and `graph.json`.

Nothing of a saved graph is executed: the program is parsed (`xlathe.parser`), arrays are read when needed.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from xlathe import card as cards
from xlathe.errors import GraphFileError, OptionError, as_path
from xlathe.graph import Graph, Origin, Record, Weights
from xlathe.parser import parse
from xlathe.printer import to_text

PROGRAM, WEIGHTS, META, TOKENIZER = "graph.py", "weights.safetensors", "graph.json", "tokenizer.json"
FORMAT, VERSION = "xlathe-graph", 1
DTYPE_NAMES = {  # by their names in safetensors
    "BOOL": "bool",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


def save_graph(graph: Graph, directory: str | os.PathLike[str]) -> None:
    """Writes a graph, its weights prepared, into a directory (made if need be).

    Raises GraphFileError for an equation, a name or a dtype that has no form in the files, and where they cannot be
    written; OptionError where the card holds what JSON does not.
    """
    folder, text = as_path(directory, GraphFileError), to_text(graph)
    prepared = graph.weights.prepare(list(graph.names("weight", "const")))
    arrays = {name: np.asarray(array, order="C") for name, array in prepared.items()}
    for name, array in arrays.items():
        if array.dtype.name not in DTYPE_NAMES.values():
            raise GraphFileError(f"{name} is {array.dtype.name}, which a weight file cannot hold")
    try:
        _write(graph, text, arrays, folder)
    except (OSError, SafetensorError) as error:
        raise GraphFileError(f"{folder} cannot be written: {error}") from None


def _write(graph: Graph, text: str, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "max_len": graph.max_len,
        "origins": [dataclasses.asdict(each) for each in graph.origins if each.targets != (each.name,)],
        "history": [dataclasses.asdict(record) for record in graph.history],
        "card": cards.to_json(graph.card),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    save_file(dict(arrays), folder / WEIGHTS)
    shutil.copymode(folder / PROGRAM, folder / WEIGHTS)  # which safetensors writes for its owner alone
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    if graph.tokenizer is not None:
        graph.tokenizer.save(str(folder / TOKENIZER))


def load_graph(directory: str | os.PathLike[str]) -> Graph:
    """Reads a graph that `Graph.save` wrote; arrays stay on disk until they are used.

    Raises GraphFileError, naming the file and the line or array, for anything missing or malformed.
    """
    folder = as_path(directory, GraphFileError)
    meta = _meta(folder / META)
    try:
        jaxpr, inputs = parse(_read(folder / PROGRAM))
    except GraphFileError as error:
        raise GraphFileError(f"{folder / PROGRAM}: {error}") from None
    stored = WeightFile.open(folder / WEIGHTS)
    tokenizer = _tokenizer(folder / TOKENIZER)
    weights = Weights(stored, origins=_origins(folder / META, meta))
    graph = Graph(jaxpr, inputs, weights, meta["max_len"], tokenizer, _history(meta), _card(folder / META, meta))
    _check_arrays(graph, stored)
    return graph


@dataclasses.dataclass(frozen=True)
class WeightFile(Mapping[str, Any]):
    """The arrays of a safetensors file, read one at a time.

    types: shape and dtype by name, in the order of the file.
    """

    path: Path
    types: Mapping[str, tuple[tuple[int, ...], str]]

    @staticmethod
    def open(path: Path) -> "WeightFile":
        """Reads the header; raises GraphFileError where the file is missing, damaged or of unknown dtypes."""
        try:
            with safe_open(path, "numpy") as file:
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
                types = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (OSError, SafetensorError) as error:
            raise GraphFileError(f"{path} cannot be read: {error}") from None
        for name, (_, dtype) in types.items():
            if dtype not in DTYPE_NAMES:
                raise GraphFileError(f"{path}: {name} has the unknown dtype {dtype}")
        return WeightFile(path, {name: (shape, DTYPE_NAMES[code]) for name, (shape, code) in types.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.types:
            raise KeyError(name)
        with safe_open(self.path, "numpy") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.types)

    def __len__(self) -> int:
        return len(self.types)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphFileError(f"{path} cannot be read: {error}") from None


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise GraphFileError(f"{path} is no JSON: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise GraphFileError(f"{path} does not describe a graph: expected format {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise GraphFileError(f"{path} has version {meta.get('version')!r}, expected version {VERSION}")
    if type(meta.get("max_len")) is not int or meta["max_len"] < 1:
        raise GraphFileError(f"{path}: max_len must be a positive number, found {meta.get('max_len')!r}")
    return meta


def _origins(path: Path, meta: Mapping[str, Any]) -> tuple[Origin, ...]:
    try:
        return tuple(_origin(**item) for item in meta["origins"])
    except (KeyError, TypeError, ValueError) as error:
        raise GraphFileError(f"{path}: malformed origins: {error}") from None


def _origin(name: str, shape: list[int], targets: list[str]) -> Origin:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name!r} has the shape {shape!r}")
    return Origin(str(name), tuple(shape), tuple(map(str, targets)))


def _history(meta: Mapping[str, Any]) -> tuple[Record, ...]:
    try:
        return tuple(_record(**item) for item in meta["history"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise GraphFileError(f"{META}: malformed history: {error}") from None


def _record(
    name: str, hits: Any, misses: Any, notes: Any, seconds: float, equations: Any, rewrites: Any = ()
) -> Record:
    before, after = map(int, equations)
    counts = {str(rule): int(count) for rule, count in hits.items()}
    near, said, done = (tuple(map(str, lines)) for lines in (misses, notes, rewrites))
    return Record(str(name), counts, near, said, float(seconds), (before, after), done)


def _card(path: Path, meta: Mapping[str, Any]) -> cards.Card | None:
    try:
        return cards.from_json(meta.get("card"))
    except OptionError as error:
        raise GraphFileError(f"{path}: {error}") from None


def _tokenizer(path: Path) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise GraphFileError(f"{path} is no tokenizer: {error}") from None


def _check_arrays(graph: Graph, stored: WeightFile) -> None:
    for name in graph.names("weight", "const"):
        aval = graph.aval(name)
        expected = (tuple(aval.shape), jnp.dtype(aval.dtype).name)
        if name not in stored:
            raise GraphFileError(f"{stored.path} has no array {name!r} (expected {_type(expected)})")
        found = stored.types[name]
        if found != expected:
            raise GraphFileError(
                f"{stored.path}: {name!r} is {_type(found)}, the program takes {_type(expected)}"
            )


def _type(found: tuple[tuple[int, ...], str]) -> str:
    return f"{found[1]}{list(found[0])}"
