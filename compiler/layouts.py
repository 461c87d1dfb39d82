"""What the axes of a value hold: rows, tokens or positions, also inside merged axes.

Each axis holds *factors*, from outer to inner: `[b, t, 8]` reshaped to `[b * t, 8]` has an axis that holds
`("b", "t")`, and a transpose before the reshape makes it `("t", "b")`. Two values fit if their axes hold the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from xlathe import jaxpr as ir


@dataclasses.dataclass(frozen=True)
class Spread:
    """A part of an axis along which the value does not vary."""

    size: ir.Dim


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A part of an axis that depends on the sizes in a way that no rule follows."""

    size: ir.Dim


@dataclasses.dataclass(frozen=True)
class Sorted:
    """A whole axis that has the places of an axis `of` in another order; see `dispatch`.

    order: the value that says it, the place of the first one first. key: the experts that the places are sorted by, if
    that is what they are sorted by.
    """

    order: ir.Var
    of: "Factors"
    key: ir.Var | None


Factor = str | int | Spread | Unknown | Sorted  # "b", "t", or the size of a static part
Factors = tuple[Factor, ...]
Axes = tuple[Factors, ...]


@dataclasses.dataclass(frozen=True)
class Root:
    """What whole numbers of the routing of tokens to experts are made of, a number of one value alone for each.

    kind: `expert`, which expert is chosen; `order`, the place that comes next when tokens are sorted; `inverse`, where
    a token went; `counts`, how many tokens chose an expert. But for the first they depend on other tokens.
    key: the choice of experts that this is about; None where it is about another key. experts: how many there are.
    order: the value that says it, and of: the axis that was sorted, for `order` and `inverse`.
    """

    var: ir.Var
    kind: Literal["expert", "order", "inverse", "counts"]
    key: ir.Var | None
    experts: int = 0
    order: ir.Var | None = None
    of: Factors = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """What each axis of a value holds, whether the value depends on the tokens, and what it is of a routing."""

    axes: Axes
    of_tokens: bool
    root: Root | None = None


class Mixes(Exception):
    """Why an equation does not treat each token on its own, or each position."""


def moves(factors: Factors) -> bool:
    """Says whether an axis depends on the sizes."""
    return any(not isinstance(factor, int) for factor in factors)


def by_shape(shape: Sequence[ir.Dim]) -> Axes:
    """Returns what the axes of a value that no rule follows hold, as far as their sizes tell."""
    return normal([(_by_size(n),) for n in shape])


def _by_size(size: ir.Dim) -> Factor:
    if not ir.is_symbolic(size):
        return int(size)
    for name in ("b", "t"):
        if (symbol := ir.dim_symbol(size, name)) is not None and ir.same_dim(size, symbol):
            return name
    return Unknown(size)


def normal(axes: Sequence[Factors]) -> Axes:
    """Multiplies neighboring static factors and drops ones."""
    result = []
    for factors in axes:
        merged: list[Factor] = []
        for factor in factors:
            if isinstance(factor, int) and merged and isinstance(merged[-1], int):
                merged[-1] *= factor
            elif factor != 1:
                merged.append(factor)
        result.append(tuple(merged))
    return tuple(result)


def follows_positions(factors: Factors, size: ir.Dim) -> bool:
    """Says whether an axis has one place, or a fixed number of them, for each position."""
    symbol = ir.dim_symbol(size, "t")
    each = None if symbol is None else ir.divide_dim(size, symbol)
    known = not any(isinstance(factor, Unknown) for factor in factors)
    return each is not None and "t" not in ir.dim_vars(each) and known


def same(operands: Sequence[Layout]) -> Axes:
    """Returns the axes of an elementwise result. Scalars have no axes; those and axes of size 1 fit any."""
    known = [o for o in operands if o.axes]
    of_tokens = [o.axes for o in known if o.of_tokens]
    static = [o.axes for o in known if not o.of_tokens]
    ndim = len(known[0].axes) if known else 0
    return tuple(_same_axis([axes[i] for axes in of_tokens], [axes[i] for axes in static]) for i in range(ndim))


def _same_axis(of_tokens: Sequence[Factors], static: Sequence[Factors]) -> Factors:
    long = {factors for factors in of_tokens if factors}  # the others have size 1
    if len(long) > 1 or (any(map(moves, long)) and () in of_tokens):
        raise Mixes("combines tokens with other tokens")
    if of_tokens and not long and any(map(moves, static)):
        raise Mixes("combines every token with every position (a mask that depends on the tokens' values is not kept)")
    varied = [factors for factors in static if factors and not _is_spread(factors)]
    expected = [*long, *varied, *filter(None, static), ()][0]
    if moves(expected) and not all(_fits(factors, expected) for factors in static):
        raise Mixes("combines tokens or positions that are merged into an axis in different orders")
    return expected


def _is_spread(factors: Factors) -> bool:
    return len(factors) == 1 and isinstance(factors[0], Spread)


def _fits(static: Factors, expected: Factors) -> bool:
    if not static or _is_spread(static):
        return True
    pairs = zip(static, expected, strict=False)
    return len(static) == len(expected) and all(a == b or isinstance(a, Spread) for a, b in pairs)
