"""Where the residual streams of a student and its teacher are compared: after each layer."""

import dataclasses
from typing import Final, final

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.prune.plan import PrunePlan
from xlathe.sections import layers


@final
@dataclasses.dataclass(frozen=True)
class Kept:
    """What pruning kept of the teacher in the student.

    removed: numbers of the teacher's layers that are gone; width: which features of the residual stream are left,
    ascending, or None for all.
    """

    removed: tuple[int, ...] = ()
    width: tuple[int, ...] | None = None

    def then(self, plan: PrunePlan, count: int) -> "Kept":
        """Returns what is left of a teacher of `count` layers after a further plan, of what was kept before.

        Raises OptionError for a plan of a model with other layers, or with another stream than what is left so far.
        """
        left = [i for i in range(count) if i not in self.removed]
        if plan.layers and (max(plan.layers) >= len(left) or len(plan.influence) not in (0, len(left))):
            of = f" of {len(plan.influence)}" if plan.influence else ""
            raise OptionError(
                f"the plan is of another model: it removes layer {max(plan.layers)}{of}, and {len(left)} of the "
                f"teacher's {count} are left"
            )
        width = plan.width
        if width is not None and self.width is not None:
            size = next(group.size for group in plan.groups if group.kind == "hidden")
            if size != len(self.width):
                raise OptionError(
                    f"the plan is of another model: it keeps {len(width)} of {size} features of the stream, and "
                    f"{len(self.width)} are left"
                )
            width = tuple(self.width[i] for i in width)
        removed = tuple(sorted((*self.removed, *(left[i] for i in plan.layers))))
        return Kept(removed, self.width if width is None else width)


NOTHING_GONE: Final = Kept()


@final
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Values [b, t, width] of a student and of its teacher that stand for each other, by what was kept."""

    student: tuple[ir.Var, ...] = ()
    teacher: tuple[ir.Var, ...] = ()
    kept: Kept = NOTHING_GONE


NO_PAIRS: Final = Pairs()


def pair_features(student: Graph, teacher: Graph, kept: Kept) -> Pairs:
    """Returns the ends of layers that both have. A layer whose successors are gone ends where the next kept one begins.

    Raises OptionError where layers are not found or do not correspond: more or fewer of them, or other widths, than
    `kept` explains.
    """
    own, others = _ends(student, "student"), _ends(teacher, "teacher")
    left = [i for i in range(len(others)) if i not in kept.removed]
    if len(left) != len(own):
        raise OptionError(
            f"features: the student has {len(own)} layers and {len(left)} of the teacher's {len(others)} are kept; the "
            "pruning plan says which correspond: --plan=FILE"
        )
    last = [nxt - 1 for nxt in [*left[1:], len(others)]]  # what is removed in between belongs to the layer before
    pairs = Pairs(tuple(own), tuple(others[i] for i in last), kept)
    narrow, wide = (int(each[0].aval.shape[-1]) for each in (own, others))
    if kept.width is not None and max(kept.width) >= wide:
        raise OptionError(
            f"features: the plan is of another model: it keeps feature {max(kept.width)} of a residual stream, and the "
            f"teacher's has {wide}"
        )
    if narrow != (wide if kept.width is None else len(kept.width)):
        raise OptionError(
            f"features: the student's residual stream has {narrow} features, the teacher's {wide}; the pruning plan "
            "says which were kept: --plan=FILE"
        )
    return pairs


def count_layers(graph: Graph) -> int:
    """Returns the number of layers that `pair_features` would find."""
    return len(layers(graph))


def _ends(graph: Graph, whose: str) -> list[ir.Var]:
    found = [end for _, end in layers(graph)]
    if not found:
        raise OptionError(
            f"features: found no repeated layers in the {whose}; fuse_attention finds the attention that they are told "
            "by, and other terms of the loss need none"
        )
    return found
