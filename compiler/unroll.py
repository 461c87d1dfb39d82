"""Scans over layers -> one layer after the other, each with weights of its own."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.graph import Input, is_shape
from xlathe.trace_checks import check_names


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The slices of a stacked weight, in place of the weight while its scan is unrolled."""

    slices: tuple[Any, ...]


def unroll(
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

    check_names(new_inputs)
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
