"""Integers as callers give them: Python's own, NumPy's, JAX's."""

import operator
from typing import Any


def as_integer(value: Any) -> int | None:
    """Returns an integer of any library as an `int`, None for everything else: floats, text and bools."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
