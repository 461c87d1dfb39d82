"""Storage formats of weights: what a weight is stored as, and what that stands for.

`format.py` is the contract; `scaled.py` the formats of levels and scales, over the numbers of `elements.py`; `cast.py`
plain floats; `text.py` how formats are named. A format that packs blocks of its own is one more subclass of `Format`
and a line in `text.py`.
"""

from xlathe.storage.format import Format, Part, all_lines, as_bytes, take_lines
from xlathe.storage.scaled import Scaled, Steps
from xlathe.storage.text import parse_format

__all__ = ["Format", "Part", "Scaled", "Steps", "all_lines", "as_bytes", "parse_format", "take_lines"]
