"""What a traced model must be: logits alone, names that can be told apart, nothing written and nothing drawn."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import TraceError
from xlathe.graph import Input
from xlathe.model_source import Source

_RANDOM = ("random_", "threefry", "rng_")


def check_logits(jaxpr: ir.Jaxpr) -> None:
    """Raises TraceError where a forward does not return logits [b, t, vocab] alone."""
    tokens = jaxpr.invars[-1].aval.shape
    shapes = [v.aval.shape for v in jaxpr.outvars]
    if len(shapes) != 1 or len(shapes[0]) != 3 or tuple(shapes[0][:2]) != tuple(tokens):
        raise TraceError(
            f"the model must return logits [b, t, vocab] for tokens [b, t]; it returns {shapes}. Where it returns more "
            "than logits, or takes more than tokens, trace a function that calls it: "
            "xl.trace(lambda params, tokens: ...[0], params=...)"
        )


def check_nothing_written(source: Source, arguments: Sequence[str]) -> None:
    """Raises TraceError where a forward changes a variable: by data flow, as transformations return what they take."""
    names: list[str] = []

    def after(*operands: Any) -> list[Any]:
        named = {name: jnp.ones_like(operands[-1]) for name in arguments}
        left = source.left_behind(list(operands[:-1]), operands[-1], **named)
        names.extend(left)
        return list(left.values())

    avals = [jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in source.arrays]
    traced = ir.trace(after, *avals, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    jaxpr = ir.inline_calls(traced, lambda eqn: eqn.primitive.name in ir.INLINED)
    before = dict(zip(source.names, jaxpr.invars, strict=False))
    for name, value in zip(names, jaxpr.outvars, strict=True):
        if value is not before.get(name):
            raise TraceError(
                f"the model writes {name!r} in its forward: expected logits that are a function of weights and tokens "
                "alone. Trace it in evaluation mode (model.eval()), and leave caching to the pass KVCache"
            )


def check_names(inputs: Sequence[Input]) -> None:
    """Raises TraceError for names that nobody can read, or that two inputs share."""
    names = [item.name for item in inputs]
    for name in names:
        if not name.isprintable() or not name:
            raise TraceError(f"a weight is called {name!r}: expected a name of printable characters")
    twice = sorted({repr(name) for name in names if names.count(name) > 1})
    if twice:
        raise TraceError(
            f"two inputs of the graph would be called {', '.join(twice)}; expected a name for each. Folders and names "
            "are joined by /, slices of stacked weights are numbered, captured arrays are const/0, const/1, ..., and "
            "tokens is the argument: rename a weight"
        )


def check_deterministic(jaxpr: ir.Jaxpr) -> None:
    """Raises TraceError where a forward draws random numbers that are used."""
    for eqn in ir.live_equations(jaxpr):
        if eqn.primitive.name.startswith(_RANDOM):
            raise TraceError(f"the model draws random numbers at {ir.source_line(eqn)}: trace it in evaluation mode "
                             "(model.eval(), deterministic=True)")  # fmt: skip
        for body in ir.bodies(eqn):
            check_deterministic(body)
