"""What calibration saw: statistics of the activations that each weight is multiplied with."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xlathe.errors import OptionError

_FIELDS = ("count", "absmax", "sum_squares", "sum_absolute", "gram")


@dataclasses.dataclass(frozen=True)
class InputStats:
    """Statistics of an input x [tokens, k] of a product, over all tokens seen.

    count: int64 [], tokens; absmax: float32 [k]; sum_squares, sum_absolute: float64 [k]; gram: float64 [k, k], the sum
    of x^T x, or None where it was not asked for.
    """

    count: np.ndarray
    absmax: np.ndarray
    sum_squares: np.ndarray
    sum_absolute: np.ndarray
    gram: np.ndarray | None = None

    @property
    def is_finite(self) -> bool:
        """Whether no activation was NaN, infinite or so large that a sum is."""
        fields = (self.absmax, self.sum_squares, self.sum_absolute, *([] if self.gram is None else [self.gram]))
        return all(bool(np.isfinite(field).all()) for field in fields)

    def __add__(self, other: "InputStats") -> "InputStats":
        """Returns the statistics of both."""
        both = self.gram is not None and other.gram is not None
        return InputStats(
            self.count + other.count,
            np.maximum(self.absmax, other.absmax),
            self.sum_squares + other.sum_squares,
            self.sum_absolute + other.sum_absolute,
            self.gram + other.gram if both else None,  # type: ignore[operator]
        )


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics by the name of the weight that the activations are multiplied with."""

    inputs: Mapping[str, InputStats]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with one array `<weight>:<statistic>` each."""
        arrays = {
            f"{name}:{field}": np.asarray(value)
            for name, stats in self.inputs.items()
            for field in _FIELDS
            if (value := getattr(stats, field)) is not None
        }
        save_file(arrays, Path(path))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Stats":
        """Reads what `save` wrote. Raises OptionError where the file is missing or something else."""
        try:
            arrays = load_file(Path(path))
        except (OSError, SafetensorError) as error:
            raise OptionError(f"calibration statistics {os.fspath(path)!r} cannot be read: {error}") from None
        fields: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            name, _, field = key.rpartition(":")
            if field not in _FIELDS:
                raise OptionError(f"{os.fspath(path)!r} holds no calibration statistics: unexpected array {key!r}")
            fields.setdefault(name, {})[field] = array
        for name, found in fields.items():
            missing = set(_FIELDS[:-1]) - set(found)
            if missing:
                raise OptionError(f"{os.fspath(path)!r} lacks {sorted(missing)} of {name!r}")
        return Stats({name: InputStats(**found) for name, found in fields.items()})
