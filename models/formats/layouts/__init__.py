"""How other tools lay quantized weights out in a Hugging Face directory: GPTQ, AWQ and compressed-tensors.

`layout.py` is the contract for writing, `module.py` what readers share; `bits.py` packs codes into words. A scheme that
a layout cannot hold exactly is refused, and nothing that is read is rounded anew.
"""

from xlathe.models.formats.layouts.layout import Layout
from xlathe.models.formats.layouts.table import find_layout, read_layout

__all__ = ["Layout", "find_layout", "read_layout"]
