"""Graphs on disk: `graph.py` (the printed program), `weights.safetensors` and `graph.json`.

Nothing of a saved graph is executed: the program is parsed (`xlathe.parser`), arrays are read when needed.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from xlathe import card as cards
from xlathe.errors import CheckpointError, GraphFileError, OptionError, as_path
from xlathe.files import written_together
from xlathe.graph import Graph, Origin, Record, Weights
from xlathe.parser import parse
from xlathe.prepared import Prepared
from xlathe.printer import to_text
from xlathe.safetensors_file import Tensor, read_safetensors, write_safetensors

PROGRAM, WEIGHTS, META, TOKENIZER = "graph.py", "weights.safetensors", "graph.json", "tokenizer.json"
OWNED = (PROGRAM, WEIGHTS, META, TOKENIZER)
FORMAT, VERSION = "xlathe-graph", 1


def save_graph(graph: Graph, directory: str | os.PathLike[str]) -> None:
    """Writes a graph into a directory (made if need be), its weights prepared one at a time.

    A graph that was there is replaced when all of the new one is written; what is no graph's is not.

    Raises GraphFileError for a folder with files of these names that are of no graph, for an equation, a name or a
    dtype that has no form in the files, and where they cannot be written.
    """
    folder, text = as_path(directory, GraphFileError), to_text(graph)
    other = next((name for name in OWNED if (folder / name).exists()), None)
    if other is not None and not (folder / PROGRAM).exists():
        raise GraphFileError(f"{folder} holds {other}, which is of no graph: expected a folder without, or a graph's")
    try:
        _write(graph, text, folder)
    except CheckpointError as error:
        raise GraphFileError(str(error)) from None
    except OSError as error:
        raise GraphFileError(f"{folder} cannot be written: {error}") from None


def _write(graph: Graph, text: str, folder: Path) -> None:
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "max_len": graph.max_len,
        "origins": [dataclasses.asdict(each) for each in graph.origins if each.targets != (each.name,)],
        "history": [dataclasses.asdict(record) for record in graph.history],
        "card": cards.to_json(graph.card),
    }
    prepared = Prepared(graph, "weight", "const")
    with written_together(folder, OWNED) as fresh:
        write_safetensors(fresh / WEIGHTS, {name: prepared.tensor(name) for name in prepared.names})
        (fresh / PROGRAM).write_text(text, encoding="utf-8")
        (fresh / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if graph.tokenizer is not None:
            graph.tokenizer.save(str(fresh / TOKENIZER))


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
    """The arrays of a safetensors file, mapped."""

    path: Path
    tensors: Mapping[str, Tensor]

    @staticmethod
    def open(path: Path) -> "WeightFile":
        """Reads the header; raises GraphFileError where the file is missing, damaged or of unknown dtypes."""
        try:
            return WeightFile(path, read_safetensors(path))
        except CheckpointError as error:
            raise GraphFileError(str(error)) from None

    @property
    def types(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by name, in the order of the file."""
        return {name: (tensor.shape, tensor.dtype.name) for name, tensor in self.tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


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
