"""Remove whole neurons, attention heads and layers, so that the model becomes smaller and faster as it is."""

import dataclasses
from typing import ClassVar, Literal, final

import numpy as np

from xlathe.coupling import couple, separate
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Record
from xlathe.passes.prune.cost import cost
from xlathe.passes.prune.depth import block_influence, without_layers
from xlathe.passes.prune.groups import Groups
from xlathe.passes.prune.plan import UNITS, Group, PrunePlan
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass, is_forward
from xlathe.shrink import shrink

MULTIPLE = 32
"""Neurons are kept in multiples of this where their number was one: group-wise formats and vector units want it."""
SHOWN = 5  # reasons in a message


@final
@dataclasses.dataclass(frozen=True)
class PruneStructured(Pass):
    """Removes the least important part of every group of coupled dimensions, and whole layers.

    heads, neurons: the fraction to remove of each group, 0 <= fraction < 1. A head group is a key-value head with the
    query heads that share it; neurons are inner dimensions between weights that belong to neither attention nor the
    residual stream. layers: how many to remove, those that change the residual stream least (block influence,
    Men et al. 2024, https://arxiv.org/abs/2403.03853), which needs calibration tokens.
    score: `weight`, the L2 norm of all weights concerned, or `activation`, the L2 norm of what the group feeds to
    the weights that sum over it (as in Minitron, Muralidharan et al. 2024), which needs calibration tokens.
    plan: a file that `PrunePlan.save` wrote, to be replayed instead of planning anew.

    Raises OptionError for values out of range, missing calibration, or a plan of another model; PassError where
    nothing can be pruned, with what blocks it.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = APPROXIMATE

    heads: float = 0.0
    neurons: float = 0.0
    layers: int = 0
    score: Literal["weight", "activation"] = "weight"
    plan: str | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "neurons"):
            fraction = getattr(self, name)
            if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
                raise OptionError(f"prune_structured: {name} is the fraction to remove, 0 to below 1, got {fraction}")
        if not isinstance(self.layers, int) or self.layers < 0:
            raise OptionError(f"prune_structured: layers is how many to remove, got {self.layers}")
        if self.score not in ("weight", "activation"):
            raise OptionError(f"prune_structured: score is 'weight' or 'activation', got {self.score!r}")
        if not isinstance(self.plan, str | None):
            raise OptionError(f"prune_structured: plan is the path of a file, got {self.plan!r}")
        if self.plan is not None and (self.heads or self.neurons or self.layers):
            raise OptionError("prune_structured: a plan is replayed as it is; leave out heads, neurons and layers")

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        plan = PrunePlan.load(self.plan) if self.plan is not None else self.make_plan(graph, context)
        plan = dataclasses.replace(plan, groups=plan.groups[: context.limit])
        hits = {"heads": 0, "neurons": 0, "layers": len(plan.layers)}
        for group in plan.groups:
            hits[group.kind] += group.size - len(group.kept)
        notes = (f"removed {plan.removed}", *str(plan).splitlines()[-len(UNITS) :])
        rewrites = tuple(f"{group.kind} of {group.name}" for group in plan.groups)
        return prune(graph, plan), Record("prune_structured", hits=hits, notes=notes, rewrites=rewrites)

    def make_plan(self, graph: Graph, context: Context) -> PrunePlan:
        """Returns what this pass would do to the graph, without doing it."""
        if not (self.heads or self.neurons or self.layers):
            raise OptionError("nothing to remove; give heads, neurons, layers or a plan")
        graph = separate(graph)
        influence = block_influence(graph, context) if self.layers else ()
        removed = _least(influence, self.layers)
        smaller = without_layers(graph, removed)
        found = Groups(smaller)
        scores = found.activation_scores(context) if self.score == "activation" else found.weight_scores()
        groups, kept = [], {}
        for atom, kind in found.kinds.items():
            fraction = self.heads if kind == "heads" else self.neurons
            size = int(found.dims.sizes[atom])
            count = _count(size, fraction, MULTIPLE if kind == "neurons" else 1)
            if count == size:
                continue
            kept[atom] = np.sort(np.argsort(-scores[atom], kind="stable")[:count])
            axes = tuple(found.axes[atom])
            groups.append(Group(kind, size, axes, tuple(kept[atom].tolist()), tuple(scores[atom].tolist())))
        self._check_found(groups, found)
        whole = couple(graph)
        return PrunePlan(
            tuple(groups), removed, influence, cost(graph, whole, {}), cost(smaller, found.coupling, kept)
        )

    def _check_found(self, groups: list[Group], found: Groups) -> None:
        for kind, fraction in (("heads", self.heads), ("neurons", self.neurons)):
            if fraction and not any(kind == k for k in found.kinds.values()):
                reasons = list(dict.fromkeys(found.reasons()))[:SHOWN]
                raise PassError(f"found no {kind} to prune; " + ("; ".join(reasons) or "no weight is multiplied"))


def prune(graph: Graph, plan: PrunePlan) -> Graph:
    """Returns the graph with only what the plan keeps. Raises OptionError where the plan is of another model."""
    graph = without_layers(separate(graph), plan.layers)
    found = Groups(graph)
    known = {(kind, tuple(found.axes[atom])): atom for atom, kind in found.kinds.items()}
    kept = {}
    for group in plan.groups:
        atom = known.get((group.kind, group.axes))
        if atom is None or found.dims.sizes[atom] != group.size:
            has = "no such group" if atom is None else f"{found.dims.sizes[atom]}"
            raise OptionError(
                f"the plan is of another model: it has {group.size} {group.kind} in {group.name}, "
                f"this graph has {has}"
            )
        kept[atom] = np.asarray(group.kept)
    return shrink(graph, found.coupling, kept)


def _count(size: int, fraction: float, multiple: int) -> int:
    """Returns how many of `size` stay: at least one, and a multiple where the size was one."""
    count = max(1, size - round(size * fraction))
    return -(-count // multiple) * multiple if size % multiple == 0 else count


def _least(influence: tuple[float, ...], count: int) -> tuple[int, ...]:
    if count and count >= len(influence):
        raise OptionError(f"layers={count} of {len(influence)} layers cannot go: at least one must stay")
    return tuple(sorted(int(i) for i in np.argsort(influence, kind="stable")[:count]))
