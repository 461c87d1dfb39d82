"""Choose a kernel for each operation; what has none keeps its reference body, and the reason is told."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from xlathe import jaxpr as ir
from xlathe.axes import grouped_sum
from xlathe.kernels import native
from xlathe.kernels.cached_attention import cpu as cached_attention_cpu
from xlathe.kernels.quantized_dot import cpu as quantized_dot_cpu
from xlathe.kernels.quantized_dot import cpu_ragged as quantized_ragged_dot_cpu
from xlathe.op import Op
from xlathe.ops import OPS
from xlathe.ops.quantized_ragged_dot import by_expert
from xlathe.target import Target, unit_of


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A faster way to compute an operation; both are called as the operation, `f(*operands, **attributes)`.

    compute: returns the result; uncovered: returns why the kernel cannot, or None where it can.
    """

    compute: Callable[..., jax.Array]
    uncovered: Callable[..., str | None]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What lowering chose.

    counts: by `operation: kernel` and `operation: reference`; reasons: how often no kernel was chosen, by
    `operation: reason`.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)


def lower_operations(jaxpr: ir.Jaxpr, target: Target) -> tuple[ir.Jaxpr, Choices]:
    """Replaces operations by kernels of the target, and by their reference bodies where none fits.

    Raises OptionError where activations are rounded to what the target cannot multiply.
    """
    kernels = kernels_of(target)
    by_name = {ir.OP_PREFIX + o.name: o for o in OPS}
    chosen = Choices()

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        if eqn.primitive.name == "ragged_dot_general" and target.platform == "cpu":
            return _by_expert(eqn, operands)
        operation = by_name.get(eqn.primitive.name)
        if operation is None:
            return None
        unit_of(target, ir.attributes(eqn).get("activations"))  # refuses what the target lacks
        kernel = kernels.get(operation.name)
        reason = _reason_against(kernel, operation, eqn, operands)
        chosen.counts[f"{operation.name}: {'reference' if reason else 'kernel'}"] += 1
        if kernel is not None and reason is None:
            return [kernel.compute(*operands, **ir.attributes(eqn))]
        chosen.reasons[f"{operation.name}: {reason}"] += 1
        body = ir.call_body(eqn)
        assert body is not None
        return ir.evaluate(body, operands)

    scattered = ir.inline_calls(jaxpr, lambda eqn: ir.is_op(eqn, "write_slots"))  # one scatter: XLA's own is the kernel
    return ir.retrace(scattered, rule), chosen


def _by_expert(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Products of groups of rows, as a loop over the experts that have rows: XLA on CPUs reads the weights of all."""
    summed = grouped_sum(eqn)
    if summed is None:
        return None
    rows, weights, sizes = operands

    def product(i: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(weights, i, keepdims=False)
        return jax.lax.dot_general(
            rows,
            weight,
            (((1,), (summed - 1,)), ((), ())),
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )

    return [by_expert(product, sizes, jnp.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype))]


def _reason_against(kernel: Kernel | None, operation: Op, eqn: ir.JaxprEqn, operands: list[Any]) -> str | None:
    if kernel is None:
        return "no kernel of this target"
    if not operation.recognizes(eqn):
        return "its body is no longer what its attributes say"
    return kernel.uncovered(*operands, **ir.attributes(eqn))


def kernels_of(target: Target) -> Mapping[str, Kernel]:
    """Returns the kernels that can run on a target, by operation; none where this process cannot use them."""
    return {"cpu": _cpu_kernels, "gpu_sm90": _gpu_sm90_kernels, "tpu": _tpu_kernels}[target.kernels]()


def _cpu_kernels() -> Mapping[str, Kernel]:
    reason = native.unusable()
    if reason is not None:
        logging.log_first_n(logging.WARNING, "reference bodies run, which are slower: %s", 1, reason)
        return {}
    return {
        "cached_attention": Kernel(_cached_attention_on_cpu, _cached_attention_uncovered_on_cpu),
        "quantized_dot": Kernel(quantized_dot_cpu.product, quantized_dot_cpu.uncovered),
        "quantized_ragged_dot": Kernel(
            quantized_ragged_dot_cpu.quantized_ragged_dot, quantized_ragged_dot_cpu.uncovered
        ),
    }


# Pallas takes a second to import: only who compiles for a GPU or a TPU waits for it.


def _gpu_sm90_kernels() -> Mapping[str, Kernel]:
    from xlathe.kernels.attention import gpu_sm90 as attention
    from xlathe.kernels.cached_attention import gpu_sm90 as cached_attention
    from xlathe.kernels.quantized_dot import gpu_sm90 as quantized_dot

    return {
        "attention": Kernel(attention.attention, attention.uncovered),
        "cached_attention": Kernel(cached_attention.cached_attention, cached_attention.uncovered),
        "quantized_dot": Kernel(quantized_dot.quantized_dot, quantized_dot.uncovered),
    }


def _tpu_kernels() -> Mapping[str, Kernel]:
    from xlathe.kernels.attention import tpu as attention
    from xlathe.kernels.cached_attention import tpu as cached_attention
    from xlathe.kernels.quantized_dot import tpu as quantized_dot

    return {
        "attention": Kernel(attention.attention, attention.uncovered),
        "cached_attention": Kernel(cached_attention.cached_attention, cached_attention.uncovered),
        "quantized_dot": Kernel(quantized_dot.quantized_dot, quantized_dot.uncovered),
    }


def _cached_attention_uncovered_on_cpu(*operands: Any, **options: Any) -> str | None:
    dtypes = {options[f"{stage}_dtype"] for stage in ("scores", "softmax", "probs", "out")}
    dtypes |= {str(array.dtype) for array in operands[: 1 if options.get("quantized") else 3]}
    return None if dtypes == {"float32"} else f"expected all in float32; found {', '.join(sorted(dtypes))}"


def _cached_attention_on_cpu(*operands: Any, **options: Any) -> jax.Array:
    q, keys, values, rows, positions, *more = operands
    return cached_attention_cpu.cached_attention(
        q,
        keys,
        values,
        rows,
        positions,
        scale=options["scale"],
        softcap=options["softcap"],
        window=options["window"],
        mask=more.pop(0) if options["masked"] else None,
        bias=more.pop(0).astype("float32") if options["biased"] else None,
        scales=(more.pop(0), more.pop(0)) if options.get("quantized") else None,
        table=more.pop(0) if more else None,
        layout=options.get("layout", "contiguous"),
        shared=options.get("shared"),
    )

