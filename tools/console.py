"""Where verbs print, and how they show that something is under way."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def make_console() -> Console:
    """Returns a console that prints text as it is: nothing is markup, nothing is colored by guess."""
    return Console(markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def bar(console: Console, description: str) -> Iterator[Callable[[str, float], None]]:
    """Shows a progress bar while the body runs; it moves to and fro until a fraction is reported.

    Yields a function (description, fraction done). The bar vanishes at the end; a pipe never sees it.
    """
    with _progress(console, TimeElapsedColumn()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda text, fraction: progress.update(task, description=text, total=1.0, completed=fraction)


@contextlib.contextmanager
def byte_bar(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes and the time left while the body runs; yields a function (bytes done, bytes in all)."""
    with _progress(console, DownloadColumn(binary_units=True), TimeRemainingColumn()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, total=total, completed=done)


def _progress(console: Console, *columns: ProgressColumn) -> Progress:
    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns)
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)
