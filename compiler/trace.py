"""A model as its author wrote it -> a graph with named inputs and symbolic sizes."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from xlathe import jaxpr as ir
from xlathe.align import trace_aligned
from xlathe.errors import TraceError
from xlathe.graph import Graph, Input, Record, Weights, is_shape
from xlathe.lengths import check_lengths
from xlathe.values import uniform_value

if TYPE_CHECKING:
    from flax import nnx

_RANDOM = ("random_", "threefry", "rng_")
UNCOMPARED = "weights are shapes without values: not compared with the model at short lengths"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model reduced to a function of named arrays.

    names, arrays: one a leaf; trained: whether the leaf is a weight (else a mask, a table or a statistic);
    forward: (leaves, tokens [b, t], further arguments by name) -> logits [b, t, vocab].
    left_behind: (leaves, tokens, further arguments) -> what the names hold after a forward, where it could have written
        them; but for what is sown, which is never read, and counters of random keys, which `_check_deterministic` is
        about.
    """

    names: tuple[str, ...]
    arrays: tuple[Any, ...]
    trained: tuple[bool, ...]
    forward: Callable[..., Any]
    left_behind: Callable[..., Mapping[str, Any]] = lambda leaves, tokens, **named: {}


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The slices of a stacked weight, in place of the weight while its scan is unrolled."""

    slices: tuple[Any, ...]


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
    source = _source(model, params)
    for name, array in zip(source.names, source.arrays, strict=True):
        if not _is_array(array):
            raise TraceError(f"the weight {name!r} is of type {type(array).__name__}, expected an array of numbers")
    jaxpr, constants = _trace_sizes(source, max_len, arguments)
    _check_nothing_written(source, arguments)
    captured = {f"const/{i}": array for i, array in enumerate(constants)}
    inputs = [
        *(Input(name, "weight" if t else "const") for name, t in zip(source.names, source.trained, strict=True)),
        *(Input(name, "arg") for name in arguments),
        *(Input(name, "const") for name in captured),
        Input("tokens", "arg"),
    ]
    _check_names(inputs)
    arrays = {**dict(zip(source.names, source.arrays, strict=True)), **captured}
    jaxpr, inputs, arrays = _unroll(jaxpr, inputs, arrays)
    jaxpr, kept = ir.drop_dead(jaxpr, keep=lambda i: inputs[i].kind == "arg")
    inputs = [inputs[i] for i in kept]
    stored = {i.name: _held(arrays[i.name]) for i in inputs if i.kind != "arg"}
    history = (Record("trace", notes=(UNCOMPARED,)),) if any(map(is_shape, source.arrays)) else ()
    return Graph(jaxpr, tuple(inputs), Weights(stored), max_len, tokenizer, history)


def _held(array: Any) -> Any:
    return array if is_shape(array) else np.asarray(array)


def _source(model: Any, params: Any) -> Source:
    from flax import linen, nnx  # here alone: what is loaded from disk does without

    if isinstance(model, nnx.Module):
        return _nnx_source(lambda module, tokens, **named: module(tokens, **named), model)
    if isinstance(params, nnx.Module) and callable(model):
        return _nnx_source(model, params)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module):
        apply = model[0].apply
        return _function_source(lambda v, tokens, **named: apply(v, tokens, **named), model[1], drop="params/")
    if isinstance(model, linen.Module):
        raise TraceError("a linen module is traced with its variables: xl.trace((module, variables), max_len=...)")
    if callable(model):
        if params is None:
            raise TraceError("a function f(params, tokens) is traced with its parameters: xl.trace(f, params=...)")
        return _function_source(model, params)
    raise TraceError(
        f"expected an nnx.Module, (linen module, variables) or f(params, tokens), got {type(model).__name__}"
    )


def _nnx_source(call: Callable[..., Any], module: "nnx.Module") -> Source:
    from flax import nnx

    definition, state = nnx.split(module)
    flat = list(nnx.to_flat_state(state))
    paths = [path for path, _ in flat]
    variables = [variable for _, variable in flat]  # an array kept by `nnx.data` stands for itself

    def run(leaves: list[Any], tokens: Any, **named: Any) -> tuple["nnx.Module", Any]:
        replaced = [
            v.replace(leaf) if isinstance(v, nnx.Variable) else leaf for v, leaf in zip(variables, leaves, strict=True)
        ]
        copy = nnx.merge(definition, nnx.from_flat_state(zip(paths, replaced, strict=True)))
        return copy, call(copy, tokens, **named)

    def left_behind(leaves: list[Any], tokens: Any, **named: Any) -> dict[str, Any]:
        copy, _ = run(leaves, tokens, **named)
        state = nnx.to_flat_state(nnx.state(copy, nnx.Not(nnx.Any(nnx.Intermediate, nnx.RngState))))
        return {"/".join(map(str, path)): nnx.as_pure(variable) for path, variable in state}

    arrays = tuple(v.get_value() if isinstance(v, nnx.Variable) else v for v in variables)
    return Source(
        tuple("/".join(map(str, path)) for path in paths),
        arrays,
        tuple(isinstance(variable, nnx.Param) for variable in variables),
        lambda leaves, tokens, **named: run(leaves, tokens, **named)[1],
        left_behind,
    )


def _function_source(function: Callable[..., Any], params: Any, drop: str = "") -> Source:
    boxes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_box)
    held = [(path + inner, box, leaf) for path, box in boxes for inner, leaf in _inside(box)]
    arrays, tree = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removeprefix(drop) for path, *_ in held]
    trained = tuple(_is_trained(box) and _is_inexact(leaf) for _, box, leaf in held)

    def forward(leaves: list[Any], tokens: Any, **named: Any) -> Any:
        return function(jax.tree.unflatten(tree, leaves), tokens, **named)

    return Source(tuple(names), tuple(arrays), trained, forward)


def _is_box(node: Any) -> bool:
    """Says whether a node of a tree is an array with what Flax knows of it (partitioning, the kind of variable)."""
    from flax import nnx
    from flax.core import meta

    return isinstance(node, nnx.Variable | meta.AxisMetadata)


def _inside(box: Any) -> list[tuple[Any, Any]]:
    """Returns path and leaf of all that a node holds; that of a single array needs no path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(box)
    return leaves if len(leaves) > 1 else [((), leaf) for _, leaf in leaves]


def _is_trained(box: Any) -> bool:
    from flax import nnx

    return not isinstance(box, nnx.Variable) or isinstance(box, nnx.Param)


def _is_inexact(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _is_array(leaf: Any) -> bool:
    """Says whether JAX takes a leaf of the weights for numbers, or for the shape of some."""
    try:
        jnp.result_type(leaf)
    except TypeError:
        return False
    return not isinstance(leaf, str | np.dtype | type)  # `result_type` takes these for the names of types


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
    _check_logits(jaxpr)
    _check_deterministic(jaxpr)
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


def _check_logits(jaxpr: ir.Jaxpr) -> None:
    tokens = jaxpr.invars[-1].aval.shape
    shapes = [v.aval.shape for v in jaxpr.outvars]
    if len(shapes) != 1 or len(shapes[0]) != 3 or tuple(shapes[0][:2]) != tuple(tokens):
        raise TraceError(
            f"the model must return logits [b, t, vocab] for tokens [b, t]; it returns {shapes}. Where it returns more "
            "than logits, or takes more than tokens, trace a function that calls it: "
            "xl.trace(lambda params, tokens: ...[0], params=...)"
        )


def _check_nothing_written(source: Source, arguments: Sequence[str]) -> None:
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


def _check_names(inputs: Sequence[Input]) -> None:
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


def _check_deterministic(jaxpr: ir.Jaxpr) -> None:
    for eqn in ir.live_equations(jaxpr):
        if eqn.primitive.name.startswith(_RANDOM):
            raise TraceError(f"the model draws random numbers at {ir.source_line(eqn)}: trace it in evaluation mode "
                             "(model.eval(), deterministic=True)")  # fmt: skip
        for body in ir.bodies(eqn):
            _check_deterministic(body)


def _unroll(
    jaxpr: ir.Jaxpr, inputs: list[Input], arrays: Mapping[str, Any]
) -> tuple[ir.Jaxpr, list[Input], dict[str, Any]]:
    """Unrolls scans of known length; a stacked weight that only scans read becomes one input a layer."""
    lengths = _stacked_lengths(jaxpr)
    prefix = _common_folder([i.name for i, v in zip(inputs, jaxpr.invars, strict=True) if v in lengths])
    new_inputs: list[Input] = []
    new_arrays: dict[str, Any] = {}
    avals: list[Any] = []
    for item, var in zip(inputs, jaxpr.invars, strict=True):
        if var not in lengths:
            new_inputs.append(item)
            avals.append(var.aval)
            if item.name in arrays:
                new_arrays[item.name] = arrays[item.name]
            continue
        for i in range(lengths[var]):
            name = os.path.join(prefix, str(i), item.name.removeprefix(prefix).lstrip("/"))
            new_inputs.append(Input(name, item.kind))
            new_arrays[name] = _slice(arrays[item.name], i)
            avals.append(jax.ShapeDtypeStruct(var.aval.shape[1:], var.aval.dtype))

    def unrolled(*operands: Any) -> list[Any]:
        left = iter(operands)
        grouped = [
            Stacked(tuple(next(left) for _ in range(lengths[v]))) if v in lengths else next(left) for v in jaxpr.invars
        ]
        return ir.evaluate(jaxpr, grouped, _unroll_scan)

    _check_names(new_inputs)
    return ir.trace(unrolled, *avals), new_inputs, new_arrays


def _slice(stacked: Any, index: int) -> Any:
    if is_shape(stacked):
        return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)
    return np.asarray(stacked)[index]


def _stacked_lengths(jaxpr: ir.Jaxpr) -> dict[ir.Var, int]:
    """Maps every input that is read only as a scanned-over operand to the length of its scan."""
    uses = ir.consumers(jaxpr.eqns)
    return {
        var: eqns[0].params["length"]
        for var in jaxpr.invars
        if (eqns := uses.get(var)) and all(_scans_over(eqn, var) for eqn in eqns) and var not in jaxpr.outvars
    }


def _scans_over(eqn: ir.JaxprEqn, var: ir.Var) -> bool:
    if eqn.primitive.name != "scan" or ir.is_symbolic(eqn.params["length"]):
        return False
    first = sum(ir.scan_parts(eqn))
    return not any(atom is var for atom in eqn.invars[:first])


def _common_folder(names: list[str]) -> str:
    """Returns the longest folder that holds all names (`layers` for `layers/a/b` and `layers/c`)."""
    folder = os.path.commonpath(names) if names else ""
    return os.path.dirname(folder) if folder in names else folder


def _unroll_scan(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    if eqn.primitive.name != "scan" or ir.is_symbolic(eqn.params["length"]):
        return None
    constants, carried = ir.scan_parts(eqn)
    held, carry = operands[:constants], operands[constants : constants + carried]
    order = range(eqn.params["length"])
    rows: list[list[Any]] = []
    for i in reversed(order) if eqn.params["reverse"] else order:
        slices = [xs.slices[i] if isinstance(xs, Stacked) else xs[i] for xs in operands[constants + carried :]]
        results = ir.evaluate(eqn.params["jaxpr"], [*held, *carry, *slices], _inline_or_unroll)
        carry, row = results[:carried], results[carried:]
        rows.append(row)
    if eqn.params["reverse"]:
        rows.reverse()
    stacked = [jnp.stack(column) for column in zip(*rows, strict=True)]
    return [*carry, *stacked]


def _inline_or_unroll(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    if eqn.primitive.name in ir.INLINED and (body := ir.call_body(eqn)) is not None:
        return ir.evaluate(body, operands, _inline_or_unroll, caller=eqn)
    return _unroll_scan(eqn, operands)
