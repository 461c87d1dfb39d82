"""The contract of a layout for writing: which schemes it holds, as which tensors, and how config.json tells of them."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from xlathe.safetensors_file import Packed, Tensor


class Layout(abc.ABC):
    """How quantized weights of linear modules lie in a directory.

    A module is named as in the files, `model.layers.0.mlp.up_proj`; its weight is [n, k], n outputs by k inputs.
    """

    @abc.abstractmethod
    def refusal(self, module: str, packed: Packed, n: int, k: int) -> str | None:
        """Says what is expected of a weight that has no exact form here; None where it has one."""

    @abc.abstractmethod
    def tensors(self, module: str, packed: Packed, n: int, k: int) -> Mapping[str, Tensor]:
        """Returns what a weight becomes, by the suffix of the tensor's name. Reading raises CheckpointError for numbers
        that the layout has no place for."""

    @abc.abstractmethod
    def settings(self, modules: Mapping[str, Packed], plain: Sequence[str]) -> dict[str, Any]:
        """Returns `quantization_config`. modules: the quantized ones; plain: linear modules of floats.

        Raises CheckpointError where one configuration cannot say it.
        """
