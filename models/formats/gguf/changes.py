"""How GGUF holds an array otherwise than Hugging Face does: each change knows both directions."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, final

import numpy as np

Config = Mapping[str, Any]


class Change(abc.ABC):
    """A change of one array; both directions raise ValueError where its shape does not fit the config's sizes."""

    @abc.abstractmethod
    def to_file(self, array: np.ndarray, config: Config) -> np.ndarray: ...

    @abc.abstractmethod
    def from_file(self, array: np.ndarray, config: Config) -> np.ndarray: ...

    @property
    @abc.abstractmethod
    def rows(self) -> "Change | None":
        """What becomes of a matrix whose rows are packed, [outputs, bytes]; None where they cannot stay so."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on the other side, in either direction."""
        return shape

    def dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype on the other side, in either direction."""
        return dtype


@final
class Same(Change):
    @property
    def rows(self) -> Change | None:
        return self

    def to_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return array

    def from_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return array


@final
@dataclasses.dataclass(frozen=True)
class RotaryPairs(Change):
    """Rows of a rotary projection: Hugging Face pairs rows (i, i + d/2) of a head, GGUF's llama rows (2i, 2i + 1).

    heads: the config's key of the number of heads.
    """

    heads: str

    @property
    def rows(self) -> Change | None:
        return self

    def to_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return self._swap(array, (config[self.heads], 2, -1))

    def from_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return self._swap(array, (config[self.heads], -1, 2))

    def _swap(self, array: np.ndarray, axes: tuple[int, int, int]) -> np.ndarray:
        return array.reshape(*axes, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@final
class PlusOne(Change):
    """The scale of a norm that multiplies by 1 + w in Hugging Face, and by w in GGUF. In float32."""

    @property
    def rows(self) -> Change | None:
        return None

    def to_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return array.astype(np.float32) + np.float32(1)

    def from_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return array.astype(np.float32) - np.float32(1)

    def dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(np.float32)


@final
class Transposed(Change):
    """The weight of GPT-2's `Conv1D`, [inputs, outputs] in Hugging Face, as any other in GGUF."""

    @property
    def rows(self) -> Change | None:
        return Same()

    def to_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return array.T

    def from_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return array.T

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]


@final
class HeadsTogether(Change):
    """Rows of a fused projection: head by head query, key, value in Hugging Face, first all queries in GGUF."""

    @property
    def rows(self) -> Change | None:
        return self

    def to_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return self._swap(array, (config["num_attention_heads"], 3))

    def from_file(self, array: np.ndarray, config: Config) -> np.ndarray:
        return self._swap(array, (3, config["num_attention_heads"]))

    def _swap(self, array: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
        return array.reshape(*axes, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
