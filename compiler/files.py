"""Files that are there when they are whole."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xlathe.errors import CheckpointError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file beside `path`, which takes its place when the body ends, and vanishes when it fails.

    Raises CheckpointError where it cannot be written.
    """
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(number, "wb", buffering=1 << 20) as file:
                yield file
            os.chmod(name, 0o666 & ~_umask())  # as a file that is opened by its name has
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
