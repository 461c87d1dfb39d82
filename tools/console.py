"""Where verbs print, and how they show that something is under way."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def make_console() -> Console:
    """Returns a console that prints text as it is: nothing is markup, nothing is colored by guess."""
    return Console(markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def bar(console: Console, description: str) -> Iterator[Callable[[str, float], None]]:
    """Shows a progress bar while the body runs; it moves to and fro until a fraction is reported.

    Yields a function (description, fraction done). The bar vanishes at the end; a pipe never sees it.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda text, fraction: progress.update(task, description=text, total=1.0, completed=fraction)
