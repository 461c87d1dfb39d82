"""A teacher's likeliest tokens on disk: computed once for all students, epochs and restarts.

A folder of `teacher-00000.safetensors` and so on, each with rows of `ids` [rows, length, k] (uint16 where the
vocabulary allows, else int32), `log_probs` [rows, length, k] and `rest` [rows, length], float16, as `losses.TopK` has
them: 4 k + 2 bytes a token; and `teacher.json`, which says what of, and comes last.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, final

import jax
import numpy as np

from xlathe.errors import CheckpointError, OptionError
from xlathe.files import written_together
from xlathe.graph import Graph
from xlathe.passes.distill import losses
from xlathe.passes.distill.rows import Rows
from xlathe.passes.quantize.work import digest_of
from xlathe.safetensors_file import Tensor, read_safetensors, write_safetensors

FORMAT: Final = "xlathe teacher 1"
INDEX: Final = "teacher.json"
SHARDS: Final = "teacher-*.safetensors"
SHARD_ROWS: Final = 256
AT_ONCE: Final = 4  # rows that the teacher reads


@final
@dataclasses.dataclass(frozen=True, eq=False)
class StoredTeacher:
    """What `store_teacher` wrote, mapped from the files.

    digest: of teacher, text, k and temperature; shards: the arrays of each file, SHARD_ROWS rows in all but the last.
    """

    digest: str
    shards: tuple[dict[str, Tensor], ...]

    def at(self, numbers: np.ndarray) -> losses.TopK:
        """Returns the rows of these numbers, ids int32 and logarithms float32."""
        places = [divmod(int(number), SHARD_ROWS) for number in numbers]

        def read(name: str, dtype: Any) -> Any:
            return np.stack([self.shards[shard][name].read()[row] for shard, row in places]).astype(dtype)

        return losses.TopK(read("ids", np.int32), read("log_probs", np.float32), read("rest", np.float32))


def store_teacher(
    teacher: Graph,
    rows: Rows,
    k: int,
    temperature: float,
    folder: Path,
    progress: Callable[[str, float], None] = lambda description, fraction: None,
) -> StoredTeacher:
    """Returns the teacher's k likeliest tokens at every place of the rows, from `folder` if they are there, else made.

    Raises OptionError for a k beyond the vocabulary, RequestError for rows that do not fit the teacher, CheckpointError
    where the folder holds something else.
    """
    if not 1 <= k <= teacher.vocab:
        raise OptionError(f"top_k: k={k}: expected 1 to {teacher.vocab:,}, the teacher's vocabulary")
    teacher.check_batch(rows.tokens[:, :-1])
    digest = _digest(teacher, rows, k, temperature)
    if (folder / INDEX).exists():
        return _open(folder, digest)
    count = len(rows.tokens)
    see = jax.jit(lambda arrays, batch: losses.top_k(teacher.logits(arrays, batch), k, temperature))
    with written_together(folder, (INDEX, SHARDS)) as new:
        for shard, first in enumerate(range(0, count, SHARD_ROWS)):
            found = []
            for start in range(first, min(first + SHARD_ROWS, count), AT_ONCE):
                progress("ask the teacher", start / count)
                tokens = rows.tokens[start : min(start + AT_ONCE, first + SHARD_ROWS), :-1]
                padded = np.resize(tokens, (AT_ONCE, rows.length))  # one shape, one compilation
                found.append([np.asarray(each)[: len(tokens)] for each in see(teacher.arrays, {"tokens": padded})])
            _write(
                new / SHARDS.replace("*", f"{shard:05}"), map(np.concatenate, zip(*found, strict=True)), teacher.vocab
            )
        index = {"format": FORMAT, "digest": digest, "k": k, "temperature": temperature, "rows": count}
        (new / INDEX).write_text(json.dumps(index | {"length": rows.length, "shards": -(-count // SHARD_ROWS)}) + "\n")
    return _open(folder, digest)


def _write(path: Path, arrays: Any, vocab: int) -> None:
    ids, log_probs, rest = arrays
    narrow = ids.astype(np.uint16 if vocab <= 1 << 16 else np.int32)
    parts = {"ids": narrow, "log_probs": log_probs.astype(np.float16), "rest": rest.astype(np.float16)}
    tensors = {
        name: Tensor(each.shape, each.dtype, functools.partial(np.asarray, each)) for name, each in parts.items()
    }
    write_safetensors(path, tensors)


def _open(folder: Path, digest: str) -> StoredTeacher:
    """Opens a folder; raises CheckpointError where it is of another teacher, text, k or temperature, or incomplete."""
    try:
        index = json.loads((folder / INDEX).read_text())
        found, shards, k = index["digest"], int(index["shards"]), int(index["k"])
        count, length = int(index["rows"]), int(index["length"])
        if index["format"] != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, found {index['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is no index of a teacher: {type(error).__name__}: {error}") from None
    if found != digest:
        raise CheckpointError(
            f"{folder} holds what a teacher said of something else: the teacher, the text, the length of rows, k or "
            "the temperature differ; name another folder, or remove it"
        )
    opened = tuple(read_safetensors(folder / SHARDS.replace("*", f"{shard:05}")) for shard in range(shards))
    for shard, parts in enumerate(opened):
        rows = min(SHARD_ROWS, count - shard * SHARD_ROWS)
        expected = {"ids": (rows, length, k), "log_probs": (rows, length, k), "rest": (rows, length)}
        if (shapes := {name: tensor.shape for name, tensor in parts.items()}) != expected:
            raise CheckpointError(f"{folder}: shard {shard}: expected the arrays {expected}, found {shapes}")
    return StoredTeacher(digest, opened)


def _digest(teacher: Graph, rows: Rows, k: int, temperature: float) -> str:
    arrays = {name: np.asarray(array) for name, array in teacher.arrays.items()}
    return digest_of("", [FORMAT, teacher.structural_hash, f"{k} {temperature}"], {**arrays, "tokens": rows.tokens})
