"""Files that are there when they are whole."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def written_together(folder: Path, owned: Sequence[str]) -> Iterator[Path]:
    """Yields a new directory whose files take their places in `folder` together when the body ends, and vanish when it
    fails.

    owned: patterns of the files that go then, whoever left them there. What the first one names is what makes the
    folder one of its kind: it goes first, and the new one comes last. Raises OSError where nothing can be written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield from _written_together(folder, owned)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _written_together(folder: Path, owned: Sequence[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".written-", dir=folder) as name:
        yield Path(name)
        for old in [file for pattern in owned for file in folder.glob(pattern)]:
            old.unlink(missing_ok=True)
        for new in sorted(Path(name).iterdir(), key=lambda file: file.name == owned[0]):
            os.replace(new, folder / new.name)
