"""What watches a pipeline while it runs: numbered dumps, printing after changes, a reproducer on failure."""

import abc
import dataclasses
from pathlib import Path

from xlathe.errors import GraphFileError
from xlathe.graph import Graph
from xlathe.printer import diff, to_text


class Instrument(abc.ABC):
    """Is told what happens; changes nothing."""

    @abc.abstractmethod
    def started(self, graph: Graph) -> None:
        """The pipeline begins with `graph`."""

    @abc.abstractmethod
    def finished(self, number: int, name: str, before: Graph, after: Graph) -> None:
        """Pass `number` (from 1) called `name` turned `before` into `after`."""

    @abc.abstractmethod
    def failed(self, name: str, text: str, before: Graph) -> str:
        """The pass with that name and text form failed on `before`; returns a remark for the error."""


@dataclasses.dataclass(frozen=True)
class Dump(Instrument):
    """Writes `00_input.py`, `01_canonicalize.py`, ... and, where a pass fails, `reproducer/`.

    The reproducer is the graph before the pass (`xlathe.load_graph` reads it) and `pipeline.txt`, the pass.
    """

    directory: Path

    def started(self, graph: Graph) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(0, "input", graph)

    def finished(self, number: int, name: str, before: Graph, after: Graph) -> None:
        self._write(number, name, after)

    def failed(self, name: str, text: str, before: Graph) -> str:
        folder = self.directory / "reproducer"
        try:
            before.save(folder)
        except GraphFileError as error:
            return f"no reproducer was written: {error}"
        (folder / "pipeline.txt").write_text(text + "\n", encoding="utf-8")
        return f"reproducer in {folder}"

    def _write(self, number: int, name: str, graph: Graph) -> None:
        (self.directory / f"{number:02}_{name}.py").write_text(_text(graph), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class PrintAfterChange(Instrument):
    """Prints the difference that each pass made, if it made one."""

    def started(self, graph: Graph) -> None:
        pass

    def finished(self, number: int, name: str, before: Graph, after: Graph) -> None:
        changes = diff(before, after)
        if changes:
            print(f"--- {number}: {name}\n{changes}")

    def failed(self, name: str, text: str, before: Graph) -> str:
        return ""


def _text(graph: Graph) -> str:
    """Prints a graph; one with kernels in it, which has no parseable form, as JAX prints it."""
    try:
        return to_text(graph, sources=True)
    except GraphFileError as error:
        commented = "\n".join(f"# {line}" for line in str(graph.jaxpr).splitlines())
        return f"# Not parseable: {error}\n{commented}\n"
