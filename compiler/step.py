"""Run a step graph: a flat list of tokens from any rows, and the state that they read and extend."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.graph import Graph

ARGUMENTS = ("tokens", "positions", "rows", "select")
State = tuple[jax.Array, ...]


def state_avals(graph: Graph, rows: int, slots: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each state for `rows` rows of up to `slots` tokens."""
    avals = (graph.aval(name) for name in graph.names("state"))
    sizes = {"r": rows, "s": slots}
    return [jax.ShapeDtypeStruct(ir.substitute(tuple(a.shape), sizes), a.dtype) for a in avals]


def empty_state(graph: Graph, rows: int, slots: int | None = None, fill: float = 0.0) -> State:
    """Returns states with nothing in them yet.

    fill: the value of unused slots. They are never read, so that it may be anything, NaN included.
    """
    avals = state_avals(graph, rows, slots or graph.max_len)
    return tuple(jnp.full(a.shape, fill, a.dtype) for a in avals)


def call_step(
    graph: Graph, arrays: Mapping[str, jax.Array], args: Mapping[str, Any], state: State
) -> tuple[jax.Array, State]:
    """Evaluates a step graph; traceable.

    args: `tokens`, `positions`, `rows` int32 [n] and `select` int32 [m] (which tokens to give logits for). A token
        whose row or position lies outside the state is computed but remembered nowhere (padding).
    Returns logits [m, vocab] and the new state.
    """
    sizes = {"n": args["tokens"].shape[0], "m": args["select"].shape[0]}
    if state:
        sizes |= {"r": state[0].shape[0], "s": state[0].shape[1]}
    states = dict(zip(graph.names("state"), state, strict=True))
    logits, *new = ir.evaluate_at(graph.jaxpr, graph.bind_names({**arrays, **args, **states}), sizes)
    return logits, tuple(new)


def run_step(graph: Graph, args: Mapping[str, Any], state: State) -> tuple[jax.Array, State]:
    """Runs a step graph, compiled once a set of sizes. Raises nothing for tokens out of range: see `call_step`."""
    return _compiled_step(graph)(graph.arrays, dict(args), state)


@functools.lru_cache(maxsize=32)
def _compiled_step(graph: Graph) -> Any:
    return jax.jit(functools.partial(call_step, graph))
