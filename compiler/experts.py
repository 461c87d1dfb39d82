"""Which experts may go: the axis that a router chooses from is that of the groups which tokens are multiplied in.

Without an expert the program is that with one expert fewer: its router gives no logit for it, a softmax is over those
that are left, and the numbers of those behind it are smaller by one everywhere. That is right where nothing but the
operations named here reads along the axis, and `audit` proves that the group sizes are how many tokens chose each.
"""

import dataclasses
from collections.abc import Callable

from xlathe import jaxpr as ir
from xlathe.audit import layouts_of
from xlathe.axes import grouped_sum
from xlathe.errors import DeriveError
from xlathe.graph import Graph
from xlathe.layouts import Layout, Sorted

_VIEWS = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type"})


@dataclasses.dataclass(frozen=True)
class Routing:
    """How tokens get to the experts of one layer.

    choice: the `top_k` that chooses experts, of which every token gets `chosen`; products: the `ragged_dot`s of their
    weights, in order. order: the value that says which of all choices comes next when they are sorted.
    """

    choice: ir.JaxprEqn
    products: tuple[ir.JaxprEqn, ...]
    order: ir.Var

    @property
    def chosen(self) -> int:
        return int(self.choice.params["k"])

    @property
    def sizes(self) -> ir.Atom:
        """How many choices fell on each expert, int32 [experts]."""
        return self.products[-1].invars[2]


def find_routings(graph: Graph) -> list[Routing]:
    """Returns the routings of a forward graph; none where `audit` refuses it."""
    equations = ir.live_equations(graph.jaxpr)
    products = [eqn for eqn in equations if grouped_sum(eqn) is not None]
    if not products:
        return []
    try:
        layouts = layouts_of(graph)
    except DeriveError:
        return []
    choices = {eqn.outvars[1]: eqn for eqn in equations if eqn.primitive.name == "top_k"}
    found: dict[ir.Var, list[ir.JaxprEqn]] = {}
    for eqn in products:
        key = _key(layouts, eqn)
        if key in choices:
            found.setdefault(key, []).append(eqn)
    return [Routing(choices[key], tuple(eqns), _order(layouts, eqns[0])) for key, eqns in found.items()]


def is_of_softmax(eqn: ir.JaxprEqn, made: Callable[[ir.Atom], ir.JaxprEqn | None]) -> bool:
    """Says whether a value is a quotient of exponentials, or a sum is over such: what is missing adds zero to it."""
    source = made(eqn.invars[0])
    while source is not None and source.primitive.name in (*_VIEWS, "div"):
        source = made(source.invars[0])
    return source is not None and source.primitive.name == "exp"


def _key(layouts: dict[ir.Var, Layout], eqn: ir.JaxprEqn) -> ir.Var | None:
    sizes = eqn.invars[2]
    root = layouts[sizes].root if isinstance(sizes, ir.Var) else None
    return root.key if root is not None else None


def _order(layouts: dict[ir.Var, Layout], eqn: ir.JaxprEqn) -> ir.Var:
    rows = eqn.invars[0]
    assert isinstance(rows, ir.Var)
    (place,) = layouts[rows].axes[0]
    assert isinstance(place, Sorted)
    return place.order
