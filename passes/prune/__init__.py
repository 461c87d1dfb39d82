"""Pruning: what may shrink together is found in the graph, never declared by a model."""

from xlathe.passes.prune.plan import PrunePlan
from xlathe.passes.prune.structured import PruneStructured, prune, record

__all__ = ["PrunePlan", "PruneStructured", "prune", "record"]
