"""The command line: `xlathe <verb> [words] [--flags]`."""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from xlathe.errors import XlatheError, did_you_mean
from xlathe.tools.command import UsageError, Verb

# In the order in which a newcomer meets them, each a module of its own. A verb imports JAX when it runs: help is quick.
VERBS = (
    "demo",
    "compile",
    "generate",
    "chat",
    "eval",
    "sweep",
    "opt",
    "prune",
    "distill",
    "shrink",
    "convert",
    "merge",
    "inspect",
    "passes",
)
HELP = ("help", "--help", "-h")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl-C.

    SIGTERM ends it as Ctrl-C does, so that what was half written is removed and no process stays behind, with 143.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _dispatch(words)
        sys.stdout.flush()
    except UsageError as error:
        return _fail(error, 2)
    except (XlatheError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # who read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or (len(words) == 1 and words[0] in HELP):
        print(_overview())
    elif words[0] in HELP:
        print(_find(words[1]).help())
    else:
        _find(words[0])(words[1:])


def _find(name: str) -> Verb:
    if name not in VERBS:
        raise UsageError(f"no verb {name!r}{did_you_mean(name, VERBS)}")
    verb: Verb = importlib.import_module(f"xlathe.tools.{name}").VERB
    return verb


def _overview() -> str:
    lines = [f"  {verb.name:<10} {verb.summary}" for verb in map(_find, VERBS)]
    return "\n".join(["usage: xlathe VERB [words] [--flags]", "", *lines, "", "xlathe VERB --help lists its flags."])


def _fail(error: Exception, code: int) -> int:
    print(f"xlathe: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
