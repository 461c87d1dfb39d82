"""The vocabulary of printed programs: JAX's primitives as functions, and which parameters each takes.

`from xlathe.primitives import dot_general` gives a function that binds exactly one equation, so that a
printed program can be run; the reader of saved graphs accepts these names and no others. Parameters that
are absent take their default; shardings are never written.
"""

import functools
import inspect
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlathe import jaxpr as ir
from xlathe.errors import OptionError, did_you_mean

_BY_PARAMETERS = {
    "": """
        abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e ceil clamp clz
        complex copy cosh digamma div dynamic_update_slice eq erf erf_inv floor ge gt imag is_finite le
        lgamma lt max min ne neg nextafter not optimization_barrier or population_count pow real rem
        select_n shift_left shift_right_arithmetic shift_right_logical sign sinh square stop_gradient sub
        xor""",
    "accuracy": "cbrt cos erfc exp exp2 expm1 log log1p logistic rsqrt sin sqrt tan tanh",
    "axes": "reduce_and reduce_or reduce_prod reduce_xor",
    "axes index_dtype": "argmax argmin",
    "axes out_sharding": "reduce_max reduce_min reduce_sum",
    "axis": "stack unstack",
    "axis reverse": "cumlogsumexp cummax cummin cumprod cumsum",
    "dim": "dim_as_value",
    "dimension": "concatenate",
    "dimension is_stable num_keys": "sort",
    "dimension_numbers indices_are_sorted unique_indices mode": """
        scatter scatter_add scatter_max scatter_min scatter_mul""",
    "dimension_numbers precision preferred_element_type out_sharding": "dot_general",
    "dimension_numbers slice_sizes unique_indices indices_are_sorted mode fill_value": "gather",
    "dimensions": "rev squeeze",
    "dtype shape dimension sharding": "iota",
    "exponent_bits mantissa_bits": "reduce_precision",
    "fft_type fft_lengths": "fft",
    "input_dtype": "conj",
    "k axis is_stable": "top_k",
    "new_dtype": "bitcast_convert_type",
    "new_dtype weak_type sharding": "convert_element_type",
    "new_sizes dimensions sharding": "reshape",
    "out_dtype": "mul",
    "padding_config": "pad",
    "permutation": "transpose",
    "ragged_dot_dimension_numbers precision preferred_element_type group_offset out_sharding": """
        ragged_dot_general""",
    "reps": "tile",
    "rounding_method": "round",
    "shape broadcast_dimensions sharding": "broadcast_in_dim",
    "sizes axis": "split",
    "slice_sizes": "dynamic_slice",
    "start_indices limit_indices strides": "slice",
    "window_dimensions window_strides padding base_dilation window_dilation": """
        reduce_window_max reduce_window_min reduce_window_sum""",
    """window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count
        batch_group_count precision preferred_element_type out_sharding""": "conv_general_dilated",
    "y": "integer_pow",
}

UNWRITTEN = frozenset({"sharding", "out_sharding", "accuracy"})
DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(UNWRITTEN),
    **dict.fromkeys(("precision", "preferred_element_type", "out_dtype")),
    **dict.fromkeys(("strides", "fill_value", "group_offset")),
    "weak_type": False,
}
_DTYPE_PARAMETERS = frozenset(
    {"dtype", "index_dtype", "input_dtype", "new_dtype", "out_dtype", "preferred_element_type"}
)
_DTYPE_NAMES = """
    bool int4 int8 int16 int32 int64 uint4 uint8 uint16 uint32 uint64
    float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 complex64 complex128"""
DTYPES: Mapping[str, Any] = {name: jnp.dtype(name).type for name in _DTYPE_NAMES.split()}


def python_name(primitive: str) -> str:
    """Returns a primitive's name as a Python identifier: `scatter_add`, `and_`."""
    name = primitive.replace("-", "_")
    return name + "_" if keyword.iskeyword(name) else name


PARAMETERS: Mapping[str, tuple[str, ...]] = {
    python_name(name): tuple(parameters.split())
    for parameters, names in _BY_PARAMETERS.items()
    for name in names.split()
}


def apply(name: str, *operands: Any, **params: Any) -> Any:
    """Binds the primitive called `name`; returns one value, or a tuple where it has several results.

    Raises OptionError for parameters that the primitive does not take.
    """
    known = PARAMETERS[name]
    for param in params:
        if param not in known:
            raise OptionError(f"{name} has no parameter {param!r}{did_you_mean(param, known)}")
    if name == "dim_as_value":
        return _dim_as_value(params["dim"])
    if "accuracy" in known:  # erfc has this parameter in some versions of JAX only
        return getattr(lax, name)(*operands)
    if name.startswith("scatter"):  # the body of its update is JAX's own
        return getattr(lax, name)(*operands, **params)
    missing = [param for param in known if param not in params and not _has_default(name, param)]
    if missing:
        raise OptionError(f"{name} needs the parameter {missing[0]!r}")
    given = {param: _as_parameter(param, params.get(param, DEFAULTS.get(param))) for param in known}
    if name == "reshape" and math.prod(operands[0].shape) != math.prod(given["new_sizes"]):
        raise OptionError(f"reshape from {operands[0].shape} to {given['new_sizes']} changes the number of elements")
    primitive = ir.primitive(name)
    outputs = primitive.bind(*operands, **given)
    return tuple(outputs) if primitive.multiple_results else outputs


def _has_default(name: str, param: str) -> bool:
    return param in DEFAULTS or (name, param) == ("reshape", "dimensions")


def is_default(name: str, param: str, value: Any) -> bool:
    """Says whether a parameter is left out when it is printed."""
    return param in UNWRITTEN or (_has_default(name, param) and DEFAULTS.get(param) is value)


def _as_parameter(name: str, value: Any) -> Any:
    return jnp.dtype(value) if name in _DTYPE_PARAMETERS and value is not None else value


def _dim_as_value(dim: ir.Dim) -> Any:
    return ir.primitive("dim_as_value").bind(dim=dim) if ir.is_symbolic(dim) else np.asarray(dim, np.int32)


def size(array: Any, axis: int) -> ir.Dim:
    """Returns the length of an axis."""
    return array.shape[axis]


def scan(
    body: Callable[..., Any], init: Sequence[Any], xs: Sequence[Any], *, length: ir.Dim, reverse: bool, unroll: int
) -> tuple[Any, ...]:
    """`jax.lax.scan` over flat values: body(*carry, *slices) -> (*carry, *outputs).

    Returns (*carry, *stacked outputs).
    """

    def step(carry: tuple[Any, ...], slices: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        results = body(*carry, *slices)
        return tuple(results[: len(carry)]), tuple(results[len(carry) :])

    if any(x.shape[0] != length for x in xs):
        raise OptionError(f"scan of length {length} over lengths {[x.shape[0] for x in xs]}")
    # a symbolic length is taken from what is scanned over only
    given = None if xs else length
    carry, stacked = lax.scan(step, tuple(init), tuple(xs), length=given, reverse=reverse, unroll=unroll)  # type: ignore[arg-type]
    return (*carry, *stacked)


def while_loop(
    condition: Callable[..., Any], body: Callable[..., Any], init: Sequence[Any]
) -> tuple[Any, ...]:
    """`jax.lax.while_loop` over flat values: condition(*carry) -> (bool,), body(*carry) -> carry."""
    return lax.while_loop(lambda c: condition(*c)[0], lambda c: tuple(body(*c)), tuple(init))


def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any) -> tuple[Any, ...]:
    """Runs branch `index` (int32 in range, not clamped) on the operands."""
    avals = [ir.aval_of(x) for x in operands]
    jaxprs = tuple(ir.trace(lambda *xs, b=branch: tuple(b(*xs)), *avals) for branch in branches)
    return tuple(ir.primitive("cond").bind(index, *operands, branches=jaxprs))


REGIONS: Mapping[str, Callable[..., tuple[Any, ...]]] = {
    "scan": scan,
    "while_loop": while_loop,
    "switch": switch,
}
DIM_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max_dim": jax.core.max_dim, "min_dim": jax.core.min_dim}
STRUCTURES: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (lax.GatherDimensionNumbers, lax.ScatterDimensionNumbers, lax.ConvDimensionNumbers,
                lax.RaggedDotDimensionNumbers)
}  # fmt: skip
ENUMS: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (lax.GatherScatterMode, lax.Precision, lax.DotAlgorithmPreset, lax.RoundingMethod, lax.FftType)
}
WORDS = frozenset({*PARAMETERS, *DTYPES, *REGIONS, *DIM_FUNCTIONS, *STRUCTURES, *ENUMS, "size"})


def fields_of(structure: Any) -> dict[str, Any]:
    """Returns the fields of one of `STRUCTURES` by name, but for those that have their default."""
    fields = inspect.signature(type(structure)).parameters
    values = {name: getattr(structure, name) for name in fields}
    return {name: value for name, value in values.items() if value != fields[name].default}


def __getattr__(name: str) -> Any:
    """Gives `add`, `dot_general`, ... and the dtypes and structures of printed programs."""
    if name in PARAMETERS:
        return functools.partial(apply, name)
    for table in (DTYPES, DIM_FUNCTIONS, STRUCTURES, ENUMS):
        if name in table:
            return table[name]
    raise AttributeError(f"module 'xlathe.primitives' has no attribute {name!r}")
