"""Run a step graph: a flat list of tokens from any rows, and the state that they read and extend."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.graph import Graph

ARGUMENTS = ("tokens", "positions", "rows", "select")
TABLE = "cache/table"
"""The state that says which page of a pool holds which slots, int32 [r, c]; see `xlathe.ops.write_slots`."""
State = tuple[jax.Array, ...]


def cache_sizes(graph: Graph, rows: int, slots: int) -> dict[str, int]:
    """Returns the sizes that the states have for `rows` rows of up to `slots` tokens.

    r: rows; s: slots a row; c: pages a row; p: pages of a pool, as many as all rows have. Not every graph has all.
    Raises OptionError where pages do not divide the slots.
    """
    avals = [graph.aval(name) for name in graph.names("state")]
    sizes = {"r": rows, "s": slots}
    for page in {a.shape[1] for a in avals if "p" in ir.dim_vars(a.shape[0])}:
        if slots % page:
            raise OptionError(f"max_len={slots} is no multiple of the {page} tokens that a page of the cache holds")
        sizes |= {"c": slots // page, "p": rows * (slots // page)}
    present = {name for a in avals for dim in a.shape for name in ir.dim_vars(dim)}
    return {name: size for name, size in sizes.items() if name in present}


def state_avals(graph: Graph, rows: int, slots: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each state for `rows` rows of up to `slots` tokens."""
    avals = (graph.aval(name) for name in graph.names("state"))
    sizes = cache_sizes(graph, rows, slots)
    return [jax.ShapeDtypeStruct(ir.substitute(tuple(a.shape), sizes), a.dtype) for a in avals]


def state_bytes(graph: Graph, rows: int, slots: int) -> int:
    """Returns how many bytes the states take for `rows` rows of up to `slots` tokens."""
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in state_avals(graph, rows, slots))


def empty_state(graph: Graph, rows: int, slots: int | None = None, fill: float = 0.0) -> State:
    """Returns states with nothing in them yet; see `first_state`."""
    avals = state_avals(graph, rows, slots or graph.max_len)
    return first_state(dict(zip(graph.names("state"), avals, strict=True)), fill)


def first_state(types: Mapping[str, Any], fill: float = 0.0) -> State:
    """Returns states with nothing in them yet; a table gives each row its own pages, one after the other.

    types: avals by name. fill: the value of unused slots, where a float: they are never read, so that it may be NaN.
    """
    return tuple(_first(name, aval, fill) for name, aval in types.items())


def _first(name: str, aval: Any, fill: float) -> jax.Array:
    if name.endswith(TABLE):  # a drafter's has a prefix
        return jnp.arange(math.prod(aval.shape), dtype=aval.dtype).reshape(aval.shape)
    return jnp.full(aval.shape, fill if jnp.issubdtype(aval.dtype, jnp.floating) else 0, aval.dtype)


def ring_slack(graph: Graph) -> int | None:
    """Returns the most tokens of one row that a call may bring; None for any number.

    A ring of s slots forgets a token when the one s places later is written, which has to leave the window whole.
    """
    attentions = [eqn for eqn in graph.jaxpr.eqns if ir.is_op(eqn, "cached_attention")]
    rings = [eqn for eqn in attentions if eqn.params.get("layout") == "ring"]
    return min((int(eqn.invars[1].aval.shape[1]) - eqn.params["window"] for eqn in rings), default=None)


def call_step(
    graph: Graph, arrays: Mapping[str, jax.Array], args: Mapping[str, Any], state: State
) -> tuple[jax.Array, State]:
    """Evaluates a step graph; traceable.

    args: `tokens`, `positions`, `rows` int32 [n] and `select` int32 [m] (which tokens to give logits for). A token
        whose row or position lies outside the state is computed but remembered nowhere (padding).
    Returns logits [m, vocab] and the new state.
    """
    states = dict(zip(graph.names("state"), state, strict=True))
    operands = graph.bind_names({**arrays, **args, **states})
    sizes = {
        name: size
        for var, operand in zip(graph.jaxpr.invars, operands, strict=True)
        for dim, size in zip(var.aval.shape, operand.shape, strict=True)
        for name in ir.dim_vars(dim)
    }
    logits, *new = ir.evaluate_at(graph.jaxpr, operands, sizes)
    return logits, tuple(new)


def run_step(graph: Graph, args: Mapping[str, Any], state: State) -> tuple[jax.Array, State]:
    """Runs a step graph, compiled once a set of sizes. Raises nothing for tokens out of range: see `call_step`."""
    return _compiled_step(graph)(graph.arrays, dict(args), state)


@functools.lru_cache(maxsize=32)
def _compiled_step(graph: Graph) -> Any:
    return jax.jit(functools.partial(call_step, graph))
