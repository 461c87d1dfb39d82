"""The demo's text: Python's standard library as found on the machine, split into train and test by file name.

The rule of the split looks at names alone, so it needs no list of files and holds for every version of
Python: a file that the demo is evaluated on cannot have been trained on, whichever interpreter it is from.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from tokenizers import Tokenizer

from xlathe.models.demo import files
from xlathe.models.demo.files import END_OF_TEXT

TEST_SHARE = 20  # one file in so many is held out
LARGEST = 400_000  # bytes; what is longer is a table, not code

TABLES = {"encodings", "pydoc_data"}
TEST_SUITES = {"test", "tests", "idle_test"}  # twice as much text as the library, and not always installed
SKIPPED_FOLDERS = {"site-packages", "__pycache__"} | TABLES | TEST_SUITES
SHARED_NAMES = {"__init__.py", "__main__.py"}  # found in most packages: hashed with their folder


def held_out(path: PurePosixPath) -> bool:
    """Whether a file is on the test side: decided by the SHA-256 of its name, so that moved files stay."""
    key = str(path) if path.name in SHARED_NAMES else path.name
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % TEST_SHARE == 0


def source_files(library: Path) -> Iterator[tuple[PurePosixPath, str]]:
    """Yields (relative path, text) of the sources in `library`, in order, without tables and test suites."""
    for path in sorted(library.rglob("*.py")):
        relative = PurePosixPath(path.relative_to(library).as_posix())
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if 0 < path.stat().st_size <= LARGEST:
            try:
                yield relative, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # some tests of the parser are badly encoded on purpose


def long_lines(text: str) -> set[str]:
    """The lines of `text` that say enough to be recognized in another file."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 20}


def training_files(libraries: Iterable[Path]) -> list[str]:
    """The training side of several versions of the library, given from the oldest to the newest.

    Of each relative path the newest version is kept, of equal contents one copy. A file most of whose lines
    stand in held-out files (a copy under a new name) is left out.
    """
    newest: dict[PurePosixPath, str] = {}
    held_out_lines: set[str] = set()
    for library in libraries:
        for path, text in source_files(library):
            if held_out(path):
                held_out_lines |= long_lines(text)
            else:
                newest[path] = text
    distinct = dict.fromkeys(newest[path] for path in sorted(newest))
    return [text for text in distinct if not mostly_in(long_lines(text), held_out_lines)]


def mostly_in(lines: set[str], known: set[str]) -> bool:
    """Whether more than half of `lines` are `known`."""
    return 2 * len(lines & known) > len(lines)


def encode_files(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The texts as one row of int32 tokens, each preceded by `END_OF_TEXT`."""
    rows = [[END_OF_TEXT, *encoding.ids] for encoding in tokenizer.encode_batch_fast(list(texts))]
    return np.concatenate([np.asarray(row, np.int32) for row in rows])


def held_out_files(library: Path | None = None) -> list[str]:
    """The test side of `library` (default: the running interpreter's), ordered by the hash of the names."""
    library = library or Path(sysconfig.get_path("stdlib"))
    named = [
        (hashlib.sha256(str(path).encode()).digest(), text) for path, text in source_files(library) if held_out(path)
    ]
    return [text for _, text in sorted(named)]


def held_out_tokens(limit: int) -> np.ndarray:
    """The first `limit` held-out tokens, int32 [limit]: the same for the same interpreter."""
    return encode_files(held_out_files(), files.tokenizer())[:limit]
