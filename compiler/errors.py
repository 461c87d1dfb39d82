"""The exceptions of xlathe. Each message says what is wrong, where, what was expected and what was found."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class XlatheError(Exception):
    """Base class of every error that xlathe raises on purpose."""


class OptionError(XlatheError, ValueError):
    """An option, argument or name has a value that cannot be used."""


class TraceError(XlatheError):
    """A model cannot be traced into a graph."""


class PassError(XlatheError):
    """A pass cannot be applied, or its result breaks what the pass promised."""


class DeriveError(PassError):
    """The incremental step cannot be derived: an operation mixes tokens in a way that has no rule."""


class GraphFileError(XlatheError):
    """A saved graph does not follow the format."""


class CheckpointError(XlatheError):
    """A checkpoint's files are damaged, incomplete, or of a kind or family that is not known."""


class BundleError(XlatheError):
    """A bundle on disk is damaged, foreign, expired or made for another machine."""


class RequestError(XlatheError, ValueError):
    """A generation request does not fit the compiled program."""


def as_path(value: Any, kind: type[XlatheError]) -> Path:
    """Returns a path; raises `kind` for what is none."""
    try:
        return Path(value)
    except TypeError:
        raise kind(f"expected the path of a directory, got {value!r}") from None


def brief(value: Any) -> str:
    """Returns what `value` looks like, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest of `known`, else the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(known)}"
