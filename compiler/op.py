"""High-level operations: functions with a reference body, carried through a jaxpr as one equation."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive, create_call_primitive

from xlathe import jaxpr as ir


@dataclasses.dataclass(frozen=True)
class Op:
    """A function that stays one equation in a jaxpr: `xlathe.name[attributes] operands`.

    The body is the semantics, the oracle of the tests and the fall-back of lowering; a kernel is only ever a faster
    way to compute it. Attributes are hashable numbers, strings or None, never axis numbers: `vmap` and `jvp` keep
    the attributes of a call primitive while they change its operands.
    """

    name: str
    body: Callable[..., Any]
    primitive: Primitive

    def __call__(self, *operands: Any, **attributes: Any) -> Any:
        """Binds the operation; the body takes the operands and the attributes and returns one array."""
        jaxpr = self._trace_body(operands, attributes)
        return self.primitive.bind(*operands, call_jaxpr=jaxpr, **attributes)[0]

    def _trace_body(self, operands: Sequence[Any], attributes: dict[str, Any]) -> ir.Jaxpr:
        types = tuple((aval.shape, aval.dtype) for aval in map(ir.aval_of, operands))
        return _trace_once(self.body, types, tuple(attributes.items()), ir.trace_settings())

    def recognizes(self, eqn: ir.JaxprEqn) -> bool:
        """Says whether the equation is this operation and its body still is what the attributes mean."""
        if eqn.primitive.name != self.primitive.name:
            return False
        expected = self._trace_body([a.aval for a in eqn.invars], ir.attributes(eqn))
        return str(expected) == str(ir.call_body(eqn))


@functools.lru_cache(maxsize=4096)
def _trace_once(
    body: Callable[..., Any], types: tuple[Any, ...], attributes: tuple[tuple[str, Any], ...], settings: Hashable
) -> ir.Jaxpr:
    """The layers of a model, and the sizes it is compiled for, share most of their bodies.

    Without calls of jitted functions, also in loops and branches: putting sizes in inlines them, and bodies are
    compared after that too.
    """
    avals = [jax.ShapeDtypeStruct(*each) for each in types]
    found = ((name, ir.dim_symbol(n, name)) for shape, _ in types for n in shape for name in ir.dim_vars(n))
    itself = {name: symbol for name, symbol in found if symbol is not None}
    traced: ir.Jaxpr = ir.substitute(ir.trace(lambda *xs: body(*xs, **dict(attributes)), *avals), itself)
    return traced


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Makes an operation called `xlathe.<name>` of the decorated reference body."""
    return lambda body: Op(name, body, create_call_primitive(ir.OP_PREFIX + name))
