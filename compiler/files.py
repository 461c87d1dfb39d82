"""Files that are there when they are whole."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xlathe.errors import CheckpointError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file beside `path`, which takes its place when the body ends, and vanishes when it fails.

    Raises CheckpointError where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(beside, "xb", buffering=1 << 20) as file:
            yield file
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(beside), beside):
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None
        raise
