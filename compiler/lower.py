"""Choose a kernel for each operation; what has none keeps its reference body."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from xlathe import jaxpr as ir
from xlathe.kernels import native
from xlathe.kernels.cached_attention import cpu as cached_attention_cpu
from xlathe.kernels.quantized_dot import cpu as quantized_dot_cpu
from xlathe.ops import OPS
from xlathe.target import Target

Kernel = Callable[[ir.JaxprEqn, list[Any]], jax.Array | None]
"""Computes an operation another way, or returns None where it does not fit."""


def lower_operations(jaxpr: ir.Jaxpr, target: Target) -> tuple[ir.Jaxpr, Counter[str]]:
    """Replaces operations by kernels of the target; counts `operation: kernel` and `operation: reference`."""
    kernels = kernels_of(target)
    by_name = {ir.OP_PREFIX + o.name: o for o in OPS}
    chosen: Counter[str] = Counter()

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        operation = by_name.get(eqn.primitive.name)
        if operation is None:
            return None
        kernel = kernels.get(operation.name)
        result = kernel(eqn, operands) if kernel is not None and operation.recognizes(eqn) else None
        chosen[f"{operation.name}: {'kernel' if result is not None else 'reference'}"] += 1
        if result is None:
            body = ir.call_body(eqn)
            assert body is not None
            return ir.evaluate(body, operands)
        return [result]

    return ir.retrace(jaxpr, rule), chosen


def kernels_of(target: Target) -> Mapping[str, Kernel]:
    """Returns the kernels that can run on a target, by operation; none where this process cannot use them."""
    if target.platform != "cpu":
        return {}
    reason = native.unusable()
    if reason is not None:
        logging.log_first_n(logging.WARNING, "reference bodies run, which are slower: %s", 1, reason)
        return {}
    return {"cached_attention": _cached_attention_on_cpu, "quantized_dot": _quantized_dot_on_cpu}


def _cached_attention_on_cpu(eqn: ir.JaxprEqn, operands: list[Any]) -> jax.Array | None:
    q, keys, values, rows, positions, *terms = operands
    options = ir.attributes(eqn)
    dtypes = {options[f"{stage}_dtype"] for stage in ("scores", "softmax", "probs", "out")}
    if dtypes != {"float32"} or any(array.dtype != "float32" for array in (q, keys, values)):
        return None
    return cached_attention_cpu.cached_attention(
        q,
        keys,
        values,
        rows,
        positions,
        scale=options["scale"],
        softcap=options["softcap"],
        window=options["window"],
        mask=terms.pop(0) if options["masked"] else None,
        bias=terms.pop(0).astype("float32") if options["biased"] else None,
    )


def _quantized_dot_on_cpu(eqn: ir.JaxprEqn, operands: list[Any]) -> jax.Array | None:
    x, codes, scale = operands
    if x.dtype != "float32" or codes.dtype != "int8":
        return None
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = quantized_dot_cpu.quantized_dot(flat, codes, scale)
    return y.reshape(*x.shape[:-1], codes.shape[0]).astype(eqn.params["out_dtype"])
