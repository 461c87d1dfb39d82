"""Which layouts there are, by the names that users and config.json give them."""

from collections.abc import Callable, Mapping
from typing import Final

from xlathe.errors import CheckpointError, OptionError, brief, did_you_mean
from xlathe.models.formats.layouts.awq import Awq
from xlathe.models.formats.layouts.compressed import CompressedTensors
from xlathe.models.formats.layouts.compressed_read import read_compressed
from xlathe.models.formats.layouts.gptq import Gptq
from xlathe.models.formats.layouts.gptq_read import read_awq, read_gptq
from xlathe.models.formats.layouts.layout import Layout
from xlathe.models.formats.layouts.module import Found
from xlathe.models.settings import Settings
from xlathe.safetensors_file import Tensor

LAYOUTS: Final[Mapping[str, Layout]] = {
    "gptq": Gptq("gptq"),
    "gptq_v2": Gptq("gptq_v2"),
    "awq": Awq(),
    "compressed-tensors": CompressedTensors(),
}
READERS: Final[Mapping[str, Callable[[Settings, Mapping[str, Tensor], str], Found]]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
}
"""By `quant_method`."""


def read_layout(settings: Settings, tensors: Mapping[str, Tensor], where: str) -> Found:
    """Returns tensors in which packed matrices stand for the modules that `quantization_config` tells of.

    settings: of the object under that name. Raises CheckpointError, naming the setting or the tensor, for what is
    unknown, missing, or of another form than the settings say.
    """
    method = settings.values.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise CheckpointError(
            f"{settings.where}: quant_method {brief(method)}: expected one of {', '.join(READERS)}, or weights as they "
            "were trained"
        )
    return READERS[method](settings, tensors, where)


def find_layout(name: str) -> Layout:
    """Returns the layout of that name; raises OptionError for an unknown one."""
    if name not in LAYOUTS:
        raise OptionError(f"layout: no layout {name!r}{did_you_mean(name, LAYOUTS)}")
    return LAYOUTS[name]
