"""A model as its author wrote it -> a graph with named inputs and symbolic sizes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from xlathe import jaxpr as ir
from xlathe.align import trace_aligned
from xlathe.errors import TraceError
from xlathe.graph import Graph, Input, Record, Weights, is_shape
from xlathe.lengths import check_lengths
from xlathe.model_source import Source, find_source, is_array
from xlathe.trace_checks import check_deterministic, check_logits, check_names, check_nothing_written
from xlathe.unroll import unroll
from xlathe.values import uniform_value

UNCOMPARED = "weights are shapes without values: not compared with the model at short lengths"


def trace(
    model: Any, params: Any = None, *, max_len: int, tokenizer: Any = None, arguments: Sequence[str] = ()
) -> Graph:
    """Traces a decoder or encoder into a graph whose batch and token axes are symbolic.

    model: an `nnx.Module`, a pair (linen module, variables), or a function f(params, tokens) with `params=`: a tree
        of arrays, or an `nnx.Module` for one that is called with more than tokens (positions, a mask, no cache).
        Called with int32 tokens [b, t] it returns logits [b, t, vocab]. Its weights may be shapes without values
        (`nnx.eval_shape`, `jax.ShapeDtypeStruct`): the graph serves to plan, and nothing is allocated or run.
    max_len: the longest row that the graph must serve; bounds the symbolic length.
    arguments: what else the model takes, by keyword: int32 [b, t] each (a padding mask, token types).

    Raises TraceError: where the model cannot be traced with symbolic sizes nor aligned from two lengths, does not
        return [b, t, vocab], computes something else at short lengths, draws random numbers or writes variables, or a
        weight is no array.
    """
    if not isinstance(max_len, int | np.integer) or max_len < 1:
        raise TraceError(f"max_len must be a whole number of at least 1, got {max_len!r}")
    max_len = int(max_len)
    source = find_source(model, params)
    for name, array in zip(source.names, source.arrays, strict=True):
        if not is_array(array):
            raise TraceError(f"the weight {name!r} is of type {type(array).__name__}, expected an array of numbers")
    jaxpr, constants = _trace_sizes(source, max_len, arguments)
    check_nothing_written(source, arguments)
    captured = {f"const/{i}": array for i, array in enumerate(constants)}
    inputs = [
        *(Input(name, "weight" if t else "const") for name, t in zip(source.names, source.trained, strict=True)),
        *(Input(name, "arg") for name in arguments),
        *(Input(name, "const") for name in captured),
        Input("tokens", "arg"),
    ]
    check_names(inputs)
    arrays = {**dict(zip(source.names, source.arrays, strict=True)), **captured}
    jaxpr, inputs, arrays = unroll(jaxpr, inputs, arrays)
    jaxpr, kept = ir.drop_dead(jaxpr, keep=lambda i: inputs[i].kind == "arg")
    inputs = [inputs[i] for i in kept]
    stored = {i.name: _held(arrays[i.name]) for i in inputs if i.kind != "arg"}
    history = (Record("trace", notes=(UNCOMPARED,)),) if any(map(is_shape, source.arrays)) else ()
    return Graph(jaxpr, tuple(inputs), Weights(stored), max_len, tokenizer, history)


def _held(array: Any) -> Any:
    return array if is_shape(array) else np.asarray(array)


def _trace_sizes(source: Source, max_len: int, arguments: Sequence[str]) -> tuple[ir.Jaxpr, list[np.ndarray]]:
    """Traces with symbolic sizes; where that is inconclusive, aligns traces at concrete lengths.

    The jaxpr takes the arrays of the source, the further arguments, the constants that it returns, and the tokens.
    """
    avals = [jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in source.arrays]

    def at(rows: ir.Dim, length: ir.Dim) -> ir.Jaxpr:
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

        def forward(*operands: Any) -> Any:
            leaves, named = operands[: len(avals)], dict(zip(arguments, operands[len(avals) : -1], strict=True))
            return source.forward(list(leaves), operands[-1], **named)

        try:
            jaxpr = ir.trace(forward, *avals, *[tokens] * len(arguments), tokens)
        except jax.errors.JAXTypeError as error:
            raise TraceError(f"the model branches on the values of tokens or weights: {error}") from error
        return _settled(ir.inline_calls(jaxpr, lambda eqn: eqn.primitive.name in ir.INLINED))

    extra = len(avals), len(arguments)

    def given_ones_at(rows: ir.Dim, length: ir.Dim) -> ir.Jaxpr:
        return _given_ones(at(rows, length), *extra)

    rows, length = symbolic_sizes(max_len)
    try:
        jaxpr, constants = hoist_constants(at(rows, length))
    except TraceError:
        raise
    except Exception as inconclusive:  # symbolic sizes fail in as many ways as there are Python idioms
        jaxpr, constants = trace_aligned(at, rows, length, max_len, inconclusive)
    check_logits(jaxpr)
    check_deterministic(jaxpr)
    if not any(map(is_shape, source.arrays)):
        check_lengths(given_ones_at, _given_ones(jaxpr, *extra), source.arrays, constants, max_len)
    return jaxpr, constants


def _given_ones(jaxpr: ir.Jaxpr, first: int, count: int) -> ir.Jaxpr:
    """Returns the program without `count` inputs, shaped as the tokens and equal to 1, of which one is the `first`."""
    if not count:
        return jaxpr

    def run(*operands: Any) -> list[Any]:
        ones = [jnp.ones_like(operands[-1])] * count
        return ir.evaluate(jaxpr, [*operands[:first], *ones, *operands[first:]])

    avals = [v.aval for v in jaxpr.invars]
    return ir.trace(run, *avals[:first], *avals[first + count :])


def _settled(jaxpr: ir.Jaxpr) -> ir.Jaxpr:
    """Takes branches whose condition is known, drops where arrays lie on devices, and fills empty arrays with zeros."""
    producer = ir.producers(jaxpr.eqns)

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        if eqn.primitive.name == "sharding_constraint":
            return operands
        if eqn.primitive.name == "empty":  # whose numbers nobody reads
            return [jnp.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)]
        if eqn.primitive.name != "cond" or (index := uniform_value(eqn.invars[0], producer)) is None:
            return None
        branches = eqn.params["branches"]
        return ir.evaluate(_settled(branches[min(max(int(index), 0), len(branches) - 1)]), operands[1:], caller=eqn)

    return ir.retrace(jaxpr, rule)


def symbolic_sizes(max_len: int) -> tuple[ir.Dim, ir.Dim]:
    """Returns the size variables b and t of a forward graph, with 1 <= t <= max_len known."""
    rows, length = export.symbolic_shape("b, t", constraints=["b >= 1", "t >= 1", f"t <= {max_len}"])
    return rows, length


def hoist_constants(jaxpr: ir.Jaxpr) -> tuple[ir.Jaxpr, list[np.ndarray]]:
    """Turns captured constants into inputs, one for all that are equal, placed before the last input (the tokens)."""
    captured = [np.asarray(c) for c in jaxpr.consts]
    keys = [(c.shape, c.dtype, c.tobytes()) for c in captured]
    constants = dict(zip(keys, captured, strict=True))
    places = list(constants)
    weights = [v.aval for v in jaxpr.invars[:-1]]
    tokens = jaxpr.invars[-1].aval

    def hoisted(*operands: Any) -> list[Any]:
        leaves, held, last = operands[: len(weights)], operands[len(weights) : -1], operands[-1]
        return ir.evaluate(jaxpr, [*leaves, last], constants=[held[places.index(key)] for key in keys])

    result = ir.trace(hoisted, *weights, *(jax.typeof(c) for c in constants.values()), tokens)
    return result, list(constants.values())
