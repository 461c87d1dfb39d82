"""From what attention puts out up to its values: a factor on a channel of values is one on that channel of the output.

The weighted sum over keys is linear in the values, and mixes no two of their channels. Heads that share values make
several numbers of one channel: repeated, or as an axis that the probabilities alone have.
"""

import math
from collections.abc import Mapping

import numpy as np

from xlathe import jaxpr as ir
from xlathe.axes import Axes, Einsum, Label, Labels

Found = tuple[ir.Var, Labels, list[ir.Var]]
"""A value, the labels of its axes, and what lies on the way up to it, itself among them."""


def find_values(
    producer: Mapping[ir.Var, ir.JaxprEqn], axes: Axes, var: ir.Var, labels: Labels, channel: Label
) -> Found | None:
    """Returns the values of an attention whose output is `var`, seen through views; None where it is none, or where
    they are no activations but a weight.

    labels: of `var`; channel: that of the axis of heads and their channels. Views of the values, repetitions among
    them, are seen through as well.
    """
    above = _up_views(producer, axes, var, labels)
    eqn = producer.get(above[0])
    operand = None if eqn is None else _operand(axes, eqn, above[1], channel)
    if operand is None:
        return None
    found = _up_views(producer, axes, *operand)
    if found[0] not in producer:
        return None
    return found[0], found[1], [*above[2], operand[0], *found[2]]


def copies_of(axes: Axes, whole: Label, channel: Label) -> tuple[int, ...] | None:
    """Returns the channel of each number of an axis `whole`; None where each is one of its own, in order."""
    atoms, kept = axes.resolve(whole), axes.resolve(channel)
    if atoms == kept:
        return None
    sizes = [int(axes.sizes[atom]) for atom in atoms]
    places = dict(zip(atoms, np.unravel_index(np.arange(math.prod(sizes)), sizes), strict=True))
    index = np.ravel_multi_index([places[atom] for atom in kept], [int(axes.sizes[atom]) for atom in kept])
    return tuple(index.tolist())


def _up_views(producer: Mapping[ir.Var, ir.JaxprEqn], axes: Axes, var: ir.Var, labels: Labels) -> Found:
    way: list[ir.Var] = []
    while (eqn := producer.get(var)) is not None:
        above = axes.above(eqn, labels)
        if above is None:
            break
        var, labels = above
        way.append(var)
    return var, labels, way


def _operand(axes: Axes, eqn: ir.JaxprEqn, labels: Labels, channel: Label) -> tuple[ir.Var, Labels] | None:
    """Returns the values of an attention, or the operand of a product that has most of the channels, and its labels."""
    if ir.is_op(eqn, "attention"):
        value, (batch, _, heads, _, features) = eqn.invars[2], labels
        keys = axes.fresh(value.aval.shape[1])
        return (value, (batch, keys, heads, features)) if isinstance(value, ir.Var) else None
    if eqn.primitive.name != "dot_general":
        return None
    atoms = axes.resolve(channel)
    both = zip(eqn.invars, Einsum.of(eqn).operand_labels(axes, eqn, labels), strict=True)
    found = [(var, own) for var, own in both if isinstance(var, ir.Var)]

    def count(own: Labels) -> int:
        kept = {atom for label in own for atom in axes.resolve(label)}
        return math.prod(int(axes.sizes[atom]) for atom in atoms if atom in kept)

    best = max(found, key=lambda each: count(each[1]), default=None)
    return best if best is not None and count(best[1]) > 1 else None
