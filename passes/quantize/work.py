"""What an interrupted run has finished, on disk: packed weights section by section, and activations where it goes on.

Everything is in files of one folder, named after a digest of all that they were made of: program, plan, method,
calibration, versions, and every weight up to there. So a run finds what it would have made itself, and nothing else.
Each file is whole or not there; of activations only the latest are kept.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from xlathe.passes.quantize.recipe import Encode
from xlathe.safetensors_file import Tensor, read_safetensors, write_safetensors
from xlathe.stats import InputStats

PARTS, ROWS = ".parts.safetensors", ".rows.safetensors"
CLOCK = 1.0  # seconds that a file system's clock may be behind
SMALL = ("count", "absmax", "sum_squares", "sum_absolute")  # statistics that are kept


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """What a weight became: the parts of its format, and what was seen of its activations, without x^T x."""

    parts: tuple[np.ndarray, ...]
    stats: InputStats

    @staticmethod
    def of(encoder: Encode) -> "QuantizedWeight":
        """Returns what a recipe has made."""
        assert encoder.made is not None and encoder.stats is not None
        return QuantizedWeight(encoder.made, encoder.stats)


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder of finished sections; None keeps nothing."""

    folder: Path | None

    def load(self, digest: str) -> dict[str, QuantizedWeight] | None:
        """Returns what a section's weights became, mapped from its file; None where it is not finished."""
        if self.folder is None or not (path := self.folder / (digest + PARTS)).exists():
            return None
        for each in (path, self.folder / (digest + ROWS)):
            if each.exists():
                each.touch()  # `remove` knows by this what a run took
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in read_safetensors(path).items():
            name, _, field = key.rpartition(":")
            found.setdefault(name, {})[field] = tensor.read()
        return {name: _made(fields) for name, fields in found.items()}

    def load_rows(self, digest: str) -> list[list[np.ndarray]] | None:
        """Returns the activations at the end of a section, by what they were written as; None where they are gone."""
        if self.folder is None or not (path := self.folder / (digest + ROWS)).exists():
            return None
        groups: dict[int, dict[int, np.ndarray]] = {}
        for key, tensor in read_safetensors(path).items():
            walk, row = map(int, key.split(":"))
            groups.setdefault(walk, {})[row] = tensor.read()
        return [[rows[i] for i in range(len(rows))] for _, rows in sorted(groups.items())]

    def save(
        self, digest: str, before: str, made: Mapping[str, QuantizedWeight], walks: Sequence[Sequence[np.ndarray]]
    ) -> dict[str, QuantizedWeight]:
        """Writes a finished section, activations first; returns what it made, mapped from the file.

        before: the digest of the section before it, whose activations are no longer needed.
        """
        if self.folder is None:
            return dict(made)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = {f"{walk}:{row}": value for walk, values in enumerate(walks) for row, value in enumerate(values)}
        _write(self.folder / (digest + ROWS), rows)
        arrays: dict[str, np.ndarray] = {}
        for name, each in made.items():
            arrays |= {f"{name}:{i}": part for i, part in enumerate(each.parts)}
            arrays |= {f"{name}:{field}": getattr(each.stats, field) for field in SMALL}
        _write(self.folder / (digest + PARTS), arrays)
        (self.folder / (before + ROWS)).unlink(missing_ok=True)
        found = self.load(digest)
        assert found is not None
        return found

    def others(self, digests: Iterable[str]) -> int:
        """Returns how many finished sections in the folder are of other runs than those of these digests."""
        own = set(digests)
        return sum(path.name.removesuffix(PARTS) not in own for path in self._files(PARTS))

    def finished(self, since: float) -> int:
        """Returns how many sections were written or read since a time, in seconds."""
        return len(self._files(PARTS, since))

    def remove(self, since: float) -> None:
        """Removes what was written or read since a time, in seconds, and the folder where nothing else is in it."""
        for path in (*self._files(PARTS, since), *self._files(ROWS, since)):
            path.unlink()
        if self.folder is not None and self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self, suffix: str, since: float = 0.0) -> list[Path]:
        found = [] if self.folder is None else sorted(self.folder.glob("*" + suffix))
        return [path for path in found if path.stat().st_mtime >= since - CLOCK]


def digest_of(before: str, texts: Iterable[str], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the digest that follows another one: of texts, and of arrays with their names, shapes and dtypes."""
    state = hashlib.blake2b(before.encode(), digest_size=16)
    for text in texts:
        state.update(f"{len(text)}:{text}".encode())
    for name, array in arrays.items():
        state.update(f"{name}:{array.dtype}:{array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _made(fields: Mapping[str, np.ndarray]) -> QuantizedWeight:
    parts = tuple(fields[str(i)] for i in range(len(fields) - len(SMALL)))
    return QuantizedWeight(parts, InputStats(**{field: fields[field] for field in SMALL}))


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    def tensor(array: np.ndarray) -> Tensor:
        return Tensor(array.shape, array.dtype, lambda: array)

    write_safetensors(path, {name: tensor(np.asarray(array)) for name, array in arrays.items()})
