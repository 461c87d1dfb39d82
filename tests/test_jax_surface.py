"""What xlathe relies on in JAX, fact by fact: an upgrade of JAX fails here first."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import (
    InconclusiveDimensionOperation,
    Jaxpr,
    JaxprTypeError,
    Literal,
    check_jaxpr,
    create_call_primitive,
)

from xlathe import jaxpr as ir
from xlathe import primitives

X = jax.ShapeDtypeStruct((4,), jnp.float32)


def only(function, *avals):
    (eqn,) = jax.make_jaxpr(function)(*avals).eqns
    return eqn


def sizes():
    return jax.export.symbolic_shape("b, t", constraints=["b >= 1", "t >= 1", "t <= 64"])


def test_a_jaxpr_holds_its_constants():
    table = np.arange(4.0, dtype=np.float32)
    jaxpr = jax.make_jaxpr(lambda x: x + table)(X)
    assert isinstance(jaxpr, Jaxpr)
    assert len(jaxpr.constvars) == len(jaxpr.consts) == 1 and len(jaxpr.invars) == 1
    assert np.array_equal(jaxpr.consts[0], table)


@pytest.mark.parametrize(
    ("function", "name", "param"),
    [
        (jax.jit(jnp.sin), "jit", "jaxpr"),
        (jax.checkpoint(jnp.sin), "remat2", "jaxpr"),
        (jax.nn.relu, "custom_jvp_call", "call_jaxpr"),
        (jax.custom_vjp(jnp.sin), "custom_vjp_call", "call_jaxpr"),
    ],
)
def test_call_body(function, name, param):
    if name == "custom_vjp_call":
        function.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    eqn = only(lambda x: function(x), X)
    assert eqn.primitive.name == name and isinstance(eqn.params[param], Jaxpr)
    assert name in ir.INLINED | ir.CUSTOM_DERIVATIVE


def test_get_bind_params_gives_what_bind_takes():
    eqn = only(lambda x: jax.nn.relu(x), X)
    params = eqn.primitive.get_bind_params(eqn.params)
    assert isinstance(params, dict)
    assert eqn.primitive.bind(jnp.array([-1.0, 2.0, 0.0, 3.0]), **params)[0].tolist() == [0, 2, 0, 3]


def test_call_primitive_keeps_attributes():
    call = create_call_primitive("xlathe.test")

    def body(x):
        return (x * 2,)

    def function(x):
        return call.bind(x, call_jaxpr=jax.make_jaxpr(body)(x), scale=0.5, name="half")[0]

    for changed, aval in [
        (function, X),
        (jax.vmap(function), jax.ShapeDtypeStruct((3, 4), jnp.float32)),
        (lambda x: jax.jvp(function, (x,), (x,))[0], X),
    ]:
        eqn = next(e for e in jax.make_jaxpr(changed)(aval).eqns if e.primitive is call)
        assert (eqn.params["scale"], eqn.params["name"]) == (0.5, "half")
        assert eqn.params["call_jaxpr"].invars[0].aval.shape == aval.shape


def test_call_primitive_evaluates():
    call = create_call_primitive("xlathe.test")
    jaxpr = jax.make_jaxpr(lambda x: (x * 2,))(X)
    assert call.bind(jnp.ones(4), call_jaxpr=jaxpr)[0].tolist() == [2, 2, 2, 2]


def test_user_context_keeps_the_source_line():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x))(X)  # this line
    line = ir.source_line(jaxpr.eqns[0])
    assert "test_jax_surface.py" in line
    assert ir.source_line(ir.retrace(jaxpr).eqns[0]) == line


def test_scan_counts_constants_and_carries():
    def function(w, init, xs):
        return lax.scan(lambda c, x: ((c[0] * w, c[1] + x), c[0]), (init, init), xs)

    eqn = only(function, X, X, jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert ir.scan_parts(eqn) == (1, 2)
    assert set(eqn.params) >= {"jaxpr", "length", "reverse", "unroll"}
    assert eqn.params["length"] == 3 and isinstance(eqn.params["jaxpr"], Jaxpr)


def test_while_and_cond_params():
    loop = only(lambda x: lax.while_loop(lambda c: c.sum() < 9.0, lambda c: c * 2.0, x), X)
    assert set(loop.params) == {"cond_nconsts", "cond_jaxpr", "body_nconsts", "body_jaxpr"}
    branches = jax.make_jaxpr(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x))(X).eqns[-1]
    assert set(branches.params) == {"branches"}
    assert branches.invars[0].aval.dtype == jnp.int32 and len(branches.params["branches"]) == 2


def test_dimension_expressions():
    b, t = sizes()
    assert isinstance(t, ir.DimExpr)
    assert set((2 * b * t + 1)._get_vars()) == {"b", "t"}
    assert (2 * b * t + 1)._evaluate({"b": 3, "t": 5}) == 31
    mixed = (b * t)._evaluate({"b": 3, "t": t})
    assert isinstance(mixed, ir.DimExpr) and str(mixed) == "3*t"


def test_dimension_expressions_print_as_functions():
    _, t = sizes()
    assert str(t * t) == "t^2"
    assert str(t // 2) == "floordiv(t, 2)"
    assert str(t % 3) == "mod(t, 3)"
    assert str(jax.core.max_dim(t, 3)) == "max(t, 3)"
    assert str(jax.core.min_dim(t, 3)) == "min(t, 3)"
    assert jax.core.max_dim(5, 3) == 5


def test_dimensions_compare_without_error_by_equality_only():
    b, t = sizes()
    assert t == t + 0 and t != b and t != 5
    with pytest.raises(InconclusiveDimensionOperation):
        bool(t > 5)


def test_constraints_of_a_scope():
    _, t = sizes()
    assert ir.dim_constraints(t + 1) == ("b >= 1", "t >= 1", "t <= 64")


def test_dim_as_value():
    _, t = sizes()
    eqn = only(lambda x: jnp.asarray(x.shape[0]), jax.ShapeDtypeStruct((t,), jnp.float32))
    assert eqn.primitive is ir.primitive("dim_as_value")
    assert eqn.params == {"dim": t} and eqn.outvars[0].aval.dtype == jnp.int32


def test_literals_keep_dtype_and_weakness():
    weak, strong = jax.make_jaxpr(lambda x: (x * 0.1, x * np.float32(0.1)))(X).eqns
    literal = weak.invars[1]
    assert isinstance(literal, Literal) and literal.aval.weak_type in (True, False)
    assert isinstance(strong.invars[1], Literal) and not strong.invars[1].aval.weak_type
    assert strong.invars[1].aval.dtype == jnp.float32 and float(strong.invars[1].val) == np.float32(0.1)


def test_binding_under_a_trace_stages_known_values():
    def function():
        return ir.primitive("mul").bind(2.0, 3.0, out_dtype=None)

    assert [eqn.primitive.name for eqn in jax.make_jaxpr(function)().eqns] == ["mul"]


def test_compile_time_evaluation_runs_inside_a_trace():
    inner = jax.make_jaxpr(jnp.sin)(X).eqns[0]
    seen = []

    def function(x):
        seen.append(np.asarray(ir.run(inner, [np.zeros(4, np.float32)])[0]))
        return x

    assert not jax.make_jaxpr(function)(X).eqns and seen[0].tolist() == [0, 0, 0, 0]


def test_branching_on_values_is_a_type_error():
    with pytest.raises(jax.errors.JAXTypeError):
        jax.make_jaxpr(lambda x: x if x[0] > 0 else -x)(X)


def test_check_jaxpr_finds_a_wrong_type():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(jnp.cos(x)))(X)
    check_jaxpr(jaxpr)
    other = jax.make_jaxpr(jnp.sin)(jax.ShapeDtypeStruct((5,), jnp.float32))
    wrong = jaxpr.eqns[1].replace(outvars=other.eqns[0].outvars)
    with pytest.raises(JaxprTypeError):
        check_jaxpr(jaxpr.replace(eqns=[jaxpr.eqns[0], wrong], outvars=list(wrong.outvars)))


@pytest.mark.parametrize("word", sorted(primitives.PARAMETERS))
def test_every_word_is_a_primitive(word):
    assert primitives.python_name(ir.primitive(word).name) == word


ints, matrix = jnp.arange(4), jnp.ones((4, 4))
UNARY = """
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc
    exp exp2 expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square stop_gradient
    tan tanh cumlogsumexp cummax cummin cumprod cumsum sort optimization_barrier"""
BINARY = "add sub mul div rem max min pow atan2 nextafter eq ne lt le gt ge complex"
INTEGER = "bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic shift_right_logical"
REDUCTIONS = "reduce_sum reduce_prod reduce_max reduce_min"
OTHERS = [
    lambda x: lax.bitwise_not(ints) + lax.population_count(ints) + lax.clz(ints),
    lambda x: [getattr(lax, f"reduce_{name}")(ints, (0,)) for name in ("and", "or", "xor")],
    lambda x: [f(x, 0, jnp.int32) for f in (lax.argmax, lax.argmin)],
    lambda x: lax.broadcast_in_dim(x, (3, 4), (1,)),
    lambda x: lax.concatenate([x, x], 0),
    lambda x: lax.conv_general_dilated(x[None, None], x[None, None, :2], (1,), [(1, 0)]),
    lambda x: [lax.convert_element_type(x, jnp.int32), lax.bitcast_convert_type(x, jnp.int32)],
    lambda x: lax.dot(x, x),
    lambda x: lax.dynamic_update_slice(x, lax.dynamic_slice(x, (1,), (2,)), (1,)),
    lambda x: x[ints],
    lambda x: [
        f(1.0) for f in (x.at[ints].set, x.at[ints].add, x.at[ints].mul, x.at[ints].min, x.at[ints].max)
    ],
    lambda x: lax.integer_pow(x, 3),
    lambda x: lax.iota(jnp.int32, 3),
    lambda x: lax.pad(x, 0.0, [(1, 1, 0)]),
    lambda x: lax.reduce_precision(x, 5, 5),
    lambda x: lax.rev(lax.reshape(x, (2, 2)), (0,)),
    lambda x: lax.slice(x, (0,), (2,)),
    lambda x: [jnp.split(x, 2), jnp.stack([x, x]), jnp.unstack(x), jnp.tile(x, 2), lax.top_k(x, 2)],
    lambda x: lax.squeeze(x[None].T, (1,)),
    lambda x: jnp.where(x > 0, lax.clamp(0.0, x, 1.0), jnp.copy(x)),
    lambda x: jnp.fft.fft(x),
    lambda x: [
        lax.reduce_window(x, i, f, (2,), (1,), "SAME") for i, f in ((0.0, lax.add), (np.inf, lax.min))
    ],
    lambda x: lax.reduce_window(x, -np.inf, lax.max, (2,), (1,), "SAME"),
    lambda x: lax.ragged_dot(matrix, jnp.ones((2, 4, 4)), jnp.array([2, 2])),
    lambda x: [f(lax.complex(x, x)) for f in (lax.real, lax.imag, lax.conj)],
]


def functions(names: str) -> list[Callable]:
    return [getattr(lax, name) for name in names.split()]


def samples() -> Iterator[Jaxpr]:
    for function in functions(UNARY) + OTHERS:
        yield jax.make_jaxpr(function)(X)
    for function in functions(BINARY):
        yield jax.make_jaxpr(function)(X, X)
    for function in functions(INTEGER):
        yield jax.make_jaxpr(function)(ints, ints)
    for function in functions(REDUCTIONS):
        yield jax.make_jaxpr(functools.partial(function, axes=(0,)))(X)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        if (body := ir.call_body(eqn)) is not None:
            yield from equations(body)


@functools.cache
def sampled() -> dict[str, set[str]]:
    """The parameters of each primitive as this version of JAX binds it."""
    eqns = [eqn for jaxpr in samples() for eqn in equations(jaxpr)]
    return {primitives.python_name(eqn.primitive.name): set(eqn.params) for eqn in eqns}


@pytest.mark.parametrize("word", sorted(primitives.PARAMETERS.keys() - {"add_any", "dim_as_value"}))
def test_parameters_are_those_of_jax(word):
    expected = set(primitives.PARAMETERS[word])
    if word.startswith("scatter"):
        expected |= {"update_jaxpr", "update_consts"}
    if word == "erfc":
        assert sampled()[word] <= expected
    else:
        assert sampled()[word] == expected


def test_a_trace_depends_on_what_the_settings_tell():
    """`trace_settings` is the key of traces that are kept."""
    usual = ir.trace_settings()
    assert usual == ir.trace_settings() and hash(usual) == hash(ir.trace_settings())
    for changed in (jax.enable_x64(True), jax.default_matmul_precision("highest")):
        with changed:
            assert ir.trace_settings() != usual


def test_equality_of_sizes_that_is_not_known_is_denied_and_can_be_heard():
    b, t = jax.export.symbolic_shape("b, t")
    asked = []
    rows, length = (ir.AskedDim(dim, asked) for dim in (b, t))
    assert not length == 16 and length != 2 * 4 and length not in (5, 7)  # noqa: SIM201
    assert asked == [(t, 16), (t, 8), (t, 5), (t, 7)]
    assert length == t and t == length and hash(length) == hash(t) and length + 1 == 1 + t and length != rows
    asked.clear()
    sizes = jax.eval_shape(lambda x: x.reshape(-1), jax.ShapeDtypeStruct((rows, length + 1), "int32")).shape
    assert sizes[0] != 39 and (b * t + b, 39) in asked
    for size, plain in ((3 * length - 1, 3 * t - 1), (divmod(length, 7)[1], t % 7), (length // 2, t // 2)):
        assert size != 4 and asked[-1] == (plain, 4)


def test_numbers_that_a_size_may_equal():
    b, t = jax.export.symbolic_shape("b, t", constraints=["b >= 1", "t >= 1", "t <= 64"])
    assert ir.may_equal(t, 64) and ir.may_equal(b * t, 39) and ir.may_equal(t % 7, 0)
    assert not ir.may_equal(t, 65) and not ir.may_equal(b * t, 0)
