"""Remove whole neurons, attention heads and layers, so that the model becomes smaller and faster as it is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import numpy as np

from xlathe.coupling import couple, separate
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Record
from xlathe.passes.prune.cost import cost
from xlathe.passes.prune.depth import block_influence, least, without_layers
from xlathe.passes.prune.groups import MULTIPLES, Groups, choose
from xlathe.passes.prune.latency import Measure, decode_timer
from xlathe.passes.prune.plan import WORDS, Group, Kind, PrunePlan
from xlathe.passes.prune.scores import BY_WEIGHT, SCORES, Score, score_groups
from xlathe.passes.prune.search import BUDGETS, Budget, search
from xlathe.pipeline import APPROXIMATE, Context, Keeps, Pass, is_forward
from xlathe.shrink import shrink

SHOWN = 5  # reasons in a message
UNCUT = "features of the stream are left alone: by the size of weights (score={}) they are cut with force=True only"


@final
@dataclasses.dataclass(frozen=True)
class PruneStructured(Pass):
    """Removes the least important part of every group of coupled dimensions, and whole layers.

    heads, neurons, hidden, experts, value_dims, query_key_dims: the fraction to remove of each group, 0 <= fraction
    < 1. A head group is a key-value head with the query heads that share it; neurons are inner dimensions between
    weights that belong to neither attention nor the residual stream; hidden is the features of that stream, whose norms
    then count the features that are kept. An expert goes with its row of the router, and as many stay as a token gets.
    value_dims are channels of values, the same of every head of a layer, query_key_dims channels of queries and keys,
    in pairs where they are rotated together. Their products are scaled as before: what goes counts as zero. Budgets
    leave both alone: no config.json says that values are narrower than keys, or which pairs are left.
    layers: how many to remove, those that change the residual stream least (block influence,
    Men et al. 2024, https://arxiv.org/abs/2403.03853), which needs calibration tokens.
    params, megabytes, latency: a budget instead, as a fraction of the parameters, in 10^6 bytes of weights, or in
    milliseconds of a decoded token: `search` finds the shape, and needs calibration tokens, the last of which it
    compares candidates on. Time is that of the pruned graph as `xlathe.compile` would serve it on this machine at
    batch 1, with as many tokens in the cache as the graph was traced for (`max_len`).
    score: `weight` or `weight_l1`, the L2 or L1 norm of all weights concerned, `activation`, the size of what the group
    feeds to the weights that sum over it (as in Minitron, Muralidharan et al. 2024), or `taylor`, what the loss would
    change by; the last two need calibration tokens. force: cut hidden by the size of weights too, which ruins a model.
    plan: a file that `PrunePlan.save` wrote, to be replayed instead of planning anew.

    Raises OptionError for values out of range, missing calibration, or a plan of another model; PassError where
    nothing can be pruned, with what blocks it.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = APPROXIMATE

    heads: float = 0.0
    neurons: float = 0.0
    layers: int = 0
    score: Score = "weight"
    plan: str | None = None
    hidden: float = 0.0
    params: float | None = None
    megabytes: float | None = None
    force: bool = False
    experts: float = 0.0
    value_dims: float = 0.0
    latency: float | None = None
    query_key_dims: float = 0.0

    def __post_init__(self) -> None:
        for name in WORDS:
            fraction = getattr(self, name)
            if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
                raise OptionError(f"prune_structured: {name} is the fraction to remove, 0 to below 1, got {fraction}")
        if not isinstance(self.layers, int) or self.layers < 0:
            raise OptionError(f"prune_structured: layers is how many to remove, got {self.layers}")
        if self.score not in SCORES:
            known = ", ".join(map(repr, SCORES))
            raise OptionError(f"prune_structured: score is one of {known}, got {self.score!r}")
        if self.hidden and not self._may_cut_hidden:
            raise OptionError(
                "prune_structured: the residual stream cut by the size of weights leaves a model that predicts "
                "nothing (perplexities of 5e4 and more are published); score=activation, or force=True"
            )
        if not isinstance(self.plan, str | None):
            raise OptionError(f"prune_structured: plan is the path of a file, got {self.plan!r}")
        self._check_budget()
        shape = any(getattr(self, kind) for kind in (*WORDS, "layers"))
        if self.plan is not None and (shape or self._budget is not None):
            raise OptionError(
                f"prune_structured: a plan is replayed as it is; leave out {', '.join(WORDS)}, layers and budgets"
            )
        if self._budget is not None and shape:
            raise OptionError(
                f"prune_structured: a budget finds the shape; leave out {', '.join(WORDS)} and layers"
            )

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"prune_structured: {' and '.join(given)} are budgets; give one of them")
        if self.params is not None and not (isinstance(self.params, int | float) and 0 < self.params < 1):
            raise OptionError(f"prune_structured: params is the fraction to keep, above 0, below 1, got {self.params}")
        for name, unit in (("megabytes", "how many"), ("latency", "how many milliseconds of a token")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise OptionError(f"prune_structured: {name} is {unit} to keep, a number above 0, got {value!r}")

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        plan = PrunePlan.load(self.plan) if self.plan is not None else self.make_plan(graph, context)
        plan = dataclasses.replace(plan, groups=plan.groups[: context.limit])
        return prune(graph, plan), record(plan)

    def make_plan(self, graph: Graph, context: Context, measure: Measure = decode_timer) -> PrunePlan:
        """Returns what this pass would do, without doing it. measure: times graphs, for a budget of time."""
        removed: dict[Kind, float] = {kind: getattr(self, kind) for kind in WORDS}
        if self._budget is not None:
            kinds: list[Kind] = ["heads", "neurons", "experts", *(["hidden"] if self._may_cut_hidden else [])]  # type: ignore[list-item]
            plan = search(separate(graph), self._budget, self.score, kinds, context, measure)
            left = () if self._may_cut_hidden else (UNCUT.format(self.score),)
            return dataclasses.replace(plan, notes=(*plan.notes, *left))
        if not (any(removed.values()) or self.layers):
            raise OptionError(f"nothing to remove; give {', '.join((*WORDS, 'layers', *BUDGETS))} or a plan")
        graph = separate(graph)
        influence = block_influence(graph, context) if self.layers else ()
        gone = least(influence, self.layers)
        smaller = without_layers(graph, gone)
        found = Groups(smaller)
        groups, kept = choose(found, score_groups(found, self.score, context), removed)
        self._check_found(removed, found)
        whole = _whole(found, groups, removed)
        if whole and not groups and not gone:
            raise OptionError("nothing to remove: " + "; ".join(whole))
        before, after = cost(graph, couple(graph), {}), cost(smaller, found.coupling, kept)
        return PrunePlan(tuple(groups), gone, influence, before, after, notes=whole)

    @property
    def _budget(self) -> Budget | None:
        given = [Budget(name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None]
        return given[0] if given else None

    @property
    def _may_cut_hidden(self) -> bool:
        return self.score not in BY_WEIGHT or self.force

    def _check_found(self, removed: Mapping[Kind, float], found: Groups) -> None:
        for kind, fraction in removed.items():
            if fraction and not any(kind == k for k in found.kinds.values()):
                reasons = list(dict.fromkeys(found.reasons()))[:SHOWN]
                raise PassError(f"found no {kind} to prune; " + ("; ".join(reasons) or "no weight is multiplied"))


def _whole(found: Groups, groups: Sequence[Group], removed: Mapping[Kind, float]) -> tuple[str, ...]:
    """Says of which kinds a fraction was asked for that is too small for any of their groups."""
    cut = {group.kind for group in groups}
    sizes = {kind: sorted({int(found.dims.sizes[a]) for a, k in found.kinds.items() if k == kind}) for kind in removed}
    return tuple(
        f"{kind}={fraction} takes none: groups of {', '.join(map(str, sizes[kind]))}"
        + ("" if MULTIPLES[kind] == 1 else f", kept in multiples of {MULTIPLES[kind]} where they are such")
        for kind, fraction in removed.items()
        if fraction and kind not in cut
    )


def record(plan: PrunePlan) -> Record:
    """Returns what the history of a graph says of a plan that was carried out."""
    hits: dict[str, int] = dict.fromkeys((*WORDS, "layers"), 0)
    hits["layers"] = len(plan.layers)
    for group in plan.groups:
        hits[group.kind] += group.size - len(group.kept)
    notes = (f"removed {plan.removed}", *plan.summary)
    rewrites = tuple(f"{group.kind} of {group.name}" for group in plan.groups)
    return Record("prune_structured", hits=hits, notes=notes, rewrites=rewrites)


def prune(graph: Graph, plan: PrunePlan) -> Graph:
    """Returns the graph with only what the plan keeps. Raises OptionError where the plan is of another model."""
    graph = without_layers(separate(graph), plan.layers)
    found = Groups(graph)
    kept = {}
    for group in plan.groups:
        atom = found.find(group)
        if atom is None:
            sizes = [int(found.dims.sizes[a]) for a, k in found.kinds.items()
                     if (k, tuple(found.axes[a])) == (group.kind, group.axes)]  # fmt: skip
            raise OptionError(
                f"the plan is of another model: it has {group.size} {group.kind} in {group.name}, "
                f"this graph has {sizes[0] if sizes else 'no such group'}"
            )
        if group.kept[-1] >= group.size:
            raise OptionError(f"the plan keeps {group.kind} {group.kept[-1]} of {group.size} in {group.name}")
        kept[atom] = np.asarray(group.kept)
    return shrink(graph, found.coupling, kept)
