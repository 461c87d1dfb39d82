"""Replace operations by the kernels of a target."""

import dataclasses
from typing import ClassVar, final

from xlathe.graph import Graph, Record
from xlathe.lower import kernels_of, lower_operations
from xlathe.passes.specialize import is_specialized
from xlathe.pipeline import REASSOCIATED, Context, Keeps, Pass
from xlathe.target import find_target


@final
@dataclasses.dataclass(frozen=True)
class LowerKernels(Pass):
    """Lowers operations to kernels of `target`; those without one become their reference bodies."""

    needs = (is_specialized,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    target: str = "cpu"

    def __post_init__(self) -> None:
        find_target(self.target)

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        target = find_target(self.target)
        jaxpr, chosen = lower_operations(graph.jaxpr, target)
        notes = tuple(f"{count} by the reference body, {reason}" for reason, count in chosen.reasons.items())
        if not kernels_of(target):
            notes = (f"no kernels for {target.name} were built: reference bodies run",)
        return graph.replace(jaxpr=jaxpr), Record("lower_kernels", hits=dict(chosen.counts), notes=notes)
