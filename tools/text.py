"""Text as rows of tokens: what models are judged by, and what passes calibrate on."""

import dataclasses
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from xlathe.errors import OptionError
from xlathe.tools.command import Options
from xlathe.tools.source import CALIBRATION_ROWS, DEMO, DEMO_LENGTH

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from xlathe.graph import Graph


def read_text(path: Path, flag: str) -> str:
    """Returns the text of a file that a flag names; OptionError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--{flag}={path} is no text in UTF-8: {error}") from None
    except OSError as error:
        raise OptionError(f"--{flag}={path} cannot be read: {error.strerror}") from None


def encode(text: str, tokenizer: "Tokenizer | None", source: str, purpose: str) -> list[int]:
    """Returns the tokens of a text; OptionError where `source` has no tokenizer, which `purpose` needs."""
    if tokenizer is None:
        raise OptionError(f"{source} has no tokenizer, which {purpose} needs")
    return tokenizer.encode(text, add_special_tokens=False).ids


def find_calibration(options: Options, source: str, graph: "Graph") -> "list[np.ndarray]":
    """Returns the batches int32 [1, length] that passes calibrate on: of --calibration, or the demo's own, or none.

    They are the first of the text, --calibration_rows of them where it has as many.
    """
    count = options["calibration_rows"]
    if options["calibration"] is None:
        return [] if source != DEMO else list(training_rows(count).tokens[:, None])
    import numpy as np

    text = read_text(Path(options["calibration"]), "calibration")
    ids = np.asarray(encode(text, graph.tokenizer, source, "calibrating on a text"), np.int32)
    if not ids.size:
        raise OptionError(f"--calibration={options['calibration']}: the text has no tokens")
    length = min(graph.max_len, ids.size)
    return list(ids[: ids.size // length * length].reshape(-1, 1, length)[:count])


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """The first tokens of files, int32 [n, DEMO_LENGTH], and the names of the files."""

    names: tuple[str, ...]
    tokens: "np.ndarray"


def training_rows(count: int = CALIBRATION_ROWS) -> TrainingRows:
    """Returns up to `count` of them, from long files of this Python's library that are not held out."""
    import numpy as np

    from xlathe.models import demo
    from xlathe.models.demo import corpus

    library = Path(sysconfig.get_path("stdlib"))
    trained_on = set(corpus.training_files([library]))
    long = [(path, text) for path, text in corpus.source_files(library) if text in trained_on and len(text) > 20_000]
    chosen = [long[i] for i in np.linspace(0, len(long) - 1, min(count, len(long))).astype(int)]
    rows = {str(path): corpus.encode_files([text], demo.tokenizer())[:DEMO_LENGTH] for path, text in chosen}
    rows = {name: row for name, row in rows.items() if len(row) == DEMO_LENGTH}
    return TrainingRows(tuple(rows), np.array(list(rows.values()), np.int32).reshape(-1, DEMO_LENGTH))


def training_tokens() -> "np.ndarray":
    """Returns all tokens of this Python's library that are not held out, int32 [n]."""
    from xlathe.models import demo
    from xlathe.models.demo import corpus

    texts = corpus.training_files([Path(sysconfig.get_path("stdlib"))])
    return corpus.encode_files(texts, demo.tokenizer())


def held_out_windows(count: int) -> "np.ndarray":
    """Returns int32 [count // DEMO_LENGTH, DEMO_LENGTH] of held-out text, spread evenly over all of it.

    Raises OptionError for fewer than two windows, and for more than there are.
    """
    import numpy as np

    from xlathe.models import demo
    from xlathe.models.demo import corpus

    texts = corpus.held_out_files()
    tokens = corpus.encode_files(texts, demo.tokenizer()) if texts else np.zeros(0, np.int32)
    rows = tokens[: len(tokens) // DEMO_LENGTH * DEMO_LENGTH].reshape(-1, DEMO_LENGTH)
    wanted = count // DEMO_LENGTH
    if not 2 <= wanted <= len(rows):
        raise OptionError(
            f"--eval_tokens={count}: expected at least {2 * DEMO_LENGTH} and at most {rows.size}, "
            f"the held-out tokens in the library of this Python"
        )
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]
