"""Storage formats of weights: what a weight is stored as, and what that stands for.

`format.py` is the contract; `scaled.py` the formats of levels and scales, over the numbers of `elements.py`; `cast.py`
plain floats; `masked.py` and `scattered.py` either without its zeros; `blocks.py` the packed blocks of GGUF files,
whose bytes `block_values.py` reads; `text.py` how formats are named.
"""

from xlathe.storage.blocks import Blocks
from xlathe.storage.format import Format, Part, all_lines, as_bytes, shares, take_lines
from xlathe.storage.masked import Masked
from xlathe.storage.scaled import Scaled, Steps
from xlathe.storage.scattered import Scattered
from xlathe.storage.text import parse_format

__all__ = [
    "Blocks",
    "Format",
    "Masked",
    "Part",
    "Scaled",
    "Scattered",
    "Steps",
    "all_lines",
    "as_bytes",
    "parse_format",
    "shares",
    "take_lines",
]
