"""A model as its author wrote it -> a function of named arrays: modules of nnx and linen, and plain functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import TraceError

if TYPE_CHECKING:
    from flax import nnx


@dataclasses.dataclass(frozen=True)
class Source:
    """A model reduced to a function of named arrays.

    names, arrays: one a leaf; trained: whether the leaf is a weight (else a mask, a table or a statistic);
    forward: (leaves, tokens [b, t], further arguments by name) -> logits [b, t, vocab].
    left_behind: (leaves, tokens, further arguments) -> what the names hold after a forward, where it could have written
        them; but for what is sown, which is never read, and counters of random keys, which `xlathe.trace_checks` is
        about.
    """

    names: tuple[str, ...]
    arrays: tuple[Any, ...]
    trained: tuple[bool, ...]
    forward: Callable[..., Any]
    left_behind: Callable[..., Mapping[str, Any]] = lambda leaves, tokens, **named: {}


def find_source(model: Any, params: Any) -> Source:
    """Reads what `xlathe.trace.trace` is given; raises TraceError where it is no model."""
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
    return is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def is_array(leaf: Any) -> bool:
    """Says whether JAX takes a leaf of the weights for numbers, or for the shape of some."""
    try:
        jnp.result_type(leaf)
    except TypeError:
        return False
    return not isinstance(leaf, str | np.dtype | type)  # `result_type` takes these for the names of types
