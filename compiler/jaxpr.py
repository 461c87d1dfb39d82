"""The only file that knows JAX's intermediate representation: read it, run it, trace it again.

A rewrite never assembles equations by hand. It *evaluates* a jaxpr with some equations overridden, under
`jax.make_jaxpr`, so that JAX itself checks shapes and dtypes (the method of `docs/autodidax` in JAX).
Every upstream fact relied upon here is asserted by name in `tests/test_jax_surface.py`.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import config, source_info_util
from jax._src.core import InconclusiveDimensionOperation
from jax._src.export.shape_poly import _DimExpr as DimExpr
from jax._src.export.shape_poly import dim_as_value_p
from jax._src.lax.lax import optimization_barrier_p, ragged_dot_general_p, unstack_p
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, Var, primitives

type Atom = Var | Literal
type Dim = int | DimExpr
Rule = Callable[[JaxprEqn, list[Any]], Sequence[Any] | None]

CUSTOM_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call"})
KERNELS = frozenset({"pallas_call", "mpmd_map"})  # made for known sizes; not to be traced outside of their grid
OP_PREFIX = "xlathe."
_UNEXPORTED = {
    "add_any": primitives.add_jaxvals_p,
    "dim_as_value": dim_as_value_p,
    "optimization_barrier": optimization_barrier_p,
    "ragged_dot_general": ragged_dot_general_p,
    "split": lax.split_p,
    "stack": lax.stack_p,
    "tile": lax.tile_p,
    "unstack": unstack_p,
}
INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "eval_jaxpr"})
_OWN = os.path.dirname(os.path.abspath(__file__))
_OWN_FOLDERS = (_OWN + os.sep, os.path.join(os.path.dirname(_OWN), "passes") + os.sep)
# an installed package holds these as well: models are their authors' code, ours too
_AUTHORS_FOLDERS = tuple(os.path.join(_OWN, name) + os.sep for name in ("models", "configs"))


def trace(function: Callable[..., Any], *avals: Any) -> Jaxpr:
    """Traces `function` at the given avals (anything with `.shape` and `.dtype`) to a jaxpr with flat inputs."""
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))


def trace_settings() -> Hashable:
    """Returns all of JAX's configuration that a trace depends on (64-bit numbers, precision of products, meshes)."""
    return config.trace_context()


def call_body(eqn: JaxprEqn) -> Jaxpr | None:
    """Returns the jaxpr that a call-like equation (`jit`, `remat`, a custom derivative, one of our ops) runs."""
    for key in ("jaxpr", "call_jaxpr"):
        body = eqn.params.get(key)
        if isinstance(body, Jaxpr):
            return body
    return None


def bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    """Returns every jaxpr that an equation may run: a call's body, a loop's, the branches of a `cond`."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))]
    return [value for value in values if isinstance(value, Jaxpr)]


def bind(eqn: JaxprEqn, operands: Sequence[Any], **params: Any) -> list[Any]:
    """Runs (or traces) one equation on new operands, with some of its parameters replaced."""
    bind_params = eqn.primitive.get_bind_params({**eqn.params, **params})
    outputs = eqn.primitive.bind(*operands, **bind_params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def run(eqn: JaxprEqn, operands: Sequence[Any], **params: Any) -> list[Any]:
    """Runs one equation on known values now, also while something else is being traced."""
    with jax.ensure_compile_time_eval():
        return bind(eqn, operands, **params)


def evaluate(
    jaxpr: Jaxpr,
    operands: Sequence[Any],
    rule: Rule | None = None,
    constants: Sequence[Any] | None = None,
    caller: JaxprEqn | None = None,
) -> list[Any]:
    """Evaluates `jaxpr`; where `rule(eqn, operands)` returns values they stand for the equation's outputs.

    constants: in place of the captured ones. Source lines and name stacks of the original equations are kept on
    what is traced. caller: the call equation whose body this is; JAX traces `jnp.sort` and the like once and keeps
    the line of the first use, so that the caller's line stands for lines that do not lie below it.
    """
    if len(operands) != len(jaxpr.invars):
        raise TypeError(f"jaxpr takes {len(jaxpr.invars)} inputs, got {len(operands)}")
    held = jaxpr.consts if constants is None else constants
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, held, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with at_source_of(eqn, caller):
            outputs = rule(eqn, values) if rule else None
            if outputs is None:
                outputs = bind(eqn, values)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def expose(jaxpr: Jaxpr, wanted: Sequence[Var]) -> Jaxpr:
    """Returns the program with some of its values as further outputs."""

    def run(*operands: Any) -> list[Any]:
        seen = dict(zip(jaxpr.invars, operands, strict=True))

        def rule(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
            outputs = bind(eqn, values)
            seen.update(zip(eqn.outvars, outputs, strict=True))
            return outputs

        return [*evaluate(jaxpr, operands, rule), *(seen[var] for var in wanted)]

    return trace(run, *(v.aval for v in jaxpr.invars))


def evaluate_between(
    jaxpr: Jaxpr, operands: Sequence[Any], known: Mapping[Var, Any], wanted: Sequence[Var], sizes: Mapping[str, Dim]
) -> list[Any]:
    """Evaluates some values of `jaxpr`, with size variables replaced, from its inputs and others that are known."""
    needed = {id(eqn) for eqn in equations_between(jaxpr, known, wanted)}
    env = {**dict(zip(jaxpr.invars, operands, strict=True)), **known}
    for eqn in jaxpr.eqns:
        if id(eqn) in needed:
            values = [atom.val if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
            env |= {**dict(zip(eqn.outvars, bind_at(eqn, values, sizes), strict=True)), **known}
    return [env[var] for var in wanted]


def equations_between(jaxpr: Jaxpr, known: Iterable[Var], wanted: Iterable[Var]) -> list[JaxprEqn]:
    """Returns the equations, in order, that some values of `jaxpr` depend on where others are known."""
    given = set(known)
    missing, needed = set(wanted) - given, []
    for eqn in reversed(jaxpr.eqns):
        if not missing.isdisjoint(eqn.outvars):
            needed.append(eqn)
            missing |= {atom for atom in eqn.invars if isinstance(atom, Var) and atom not in given}
    return needed[::-1]


def retrace(jaxpr: Jaxpr, rule: Rule | None = None) -> Jaxpr:
    """Traces `jaxpr` again with `rule` overriding equations; the inputs stay the same."""
    return trace(lambda *operands: evaluate(jaxpr, operands, rule), *(v.aval for v in jaxpr.invars))


def primitive(name: str) -> Primitive:
    """Returns the primitive of JAX with this Python name (`add`, `and_`, `dim_as_value`)."""
    return _UNEXPORTED.get(name) or getattr(primitives, name.rstrip("_") + "_p")


def aval_of(value: Any) -> Any:
    """Returns shape and dtype of an array, tracer, Python number or aval."""
    return value if isinstance(value, jax.ShapeDtypeStruct | jax.core.ShapedArray) else jax.typeof(value)


def attributes(eqn: JaxprEqn) -> dict[str, Any]:
    """Returns the attributes of one of xlathe's operations: its parameters but for the body."""
    return {key: value for key, value in eqn.params.items() if key != "call_jaxpr"}


def is_op(eqn: JaxprEqn, name: str = "") -> bool:
    """Says whether the equation is one of xlathe's operations (or the one called `name`)."""
    return eqn.primitive.name == OP_PREFIX + name if name else eqn.primitive.name.startswith(OP_PREFIX)


def inline_calls(jaxpr: Jaxpr, inlined: Callable[[JaxprEqn], bool]) -> Jaxpr:
    """Replaces every call equation for which `inlined(eqn)` holds by its body, at any depth."""

    def rule(eqn: JaxprEqn, operands: list[Any]) -> list[Any] | None:
        body = call_body(eqn)
        return evaluate(body, operands, rule, caller=eqn) if body is not None and inlined(eqn) else None

    return retrace(jaxpr, rule)


def scan_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """Returns how many operands of a `scan` equation are constants and how many are carried."""
    constants, carried, _ = eqn.params["ft_in"].unpack()
    return len(constants), len(carried)


def at_source_of(eqn: JaxprEqn, caller: JaxprEqn | None = None) -> Any:
    """A context in which traced equations get the source line and name stack of `eqn`.

    Where `caller` is given, `eqn` only counts if its line was reached through the caller's.
    """
    if caller is not None:
        outer, inner = _user_frames(caller), _user_frames(eqn)
        if outer and inner[-len(outer) :] != outer:
            return contextlib.nullcontext()
    info = eqn.source_info
    return source_info_util.user_context(info.traceback, name_stack=info.name_stack)


def _user_frames(eqn: JaxprEqn) -> list[tuple[str, int, str]]:
    """Returns (file, line, function) of the model's code that made an equation, innermost first."""
    flax = getattr(sys.modules.get("flax"), "__file__", None)  # never imported here: a bundle does without
    libraries = (*_OWN_FOLDERS, os.path.dirname(flax) + os.sep) if flax else _OWN_FOLDERS
    return [
        (frame.file_name, frame.start_line, frame.function_name)
        for frame in source_info_util.user_frames(eqn.source_info.traceback)
        if not frame.file_name.startswith(libraries) or frame.file_name.startswith(_AUTHORS_FOLDERS)
    ]


def no_source_lines() -> Any:
    """A context in which lowered programs get no paths and lines of source files."""
    return config.traceback_in_locations_limit(0)


def source_line(eqn: JaxprEqn) -> str:
    """Returns `file:line (function)` of the model code that made the equation, and of up to two callers."""
    frames = [f"{file}:{line} ({function})" for file, line, function in _user_frames(eqn)[:3]]
    return ", called from ".join(frames) or "an unknown line"


def is_symbolic(dim: Dim) -> bool:
    return isinstance(dim, DimExpr)


class AskedDim(DimExpr):
    """A size that lists in `asked` which numbers it, or a size computed from it, is asked to equal.

    JAX answers no where it cannot tell, since hashing asks too: `if t == 16` is followed for no length.
    """

    __slots__ = ("asked",)

    def __init__(self, dim: DimExpr, asked: list[tuple[DimExpr, int]]) -> None:
        super().__init__(dim._sorted_terms, dim.scope)
        self.asked = asked

    def __eq__(self, other: Any) -> bool:
        plain = DimExpr(self._sorted_terms, self.scope)  # which sees no other class in `other`
        if isinstance(other, int | np.integer):
            self.asked.append((plain, int(other)))
        return plain == (DimExpr(other._sorted_terms, other.scope) if isinstance(other, AskedDim) else other)

    __hash__ = DimExpr.__hash__


def _asked_as_well(name: str) -> Callable[..., Any]:
    """The method of a size that computes others, which go on to list."""
    compute = getattr(DimExpr, name)

    def computed(self: AskedDim, *others: Any) -> Any:
        results = compute(self, *others)
        if isinstance(results, tuple):
            return tuple(AskedDim(r, self.asked) if is_symbolic(r) else r for r in results)
        return AskedDim(results, self.asked) if is_symbolic(results) else results

    return computed


for _name in ("add", "sub", "mul", "floordiv", "mod", "divmod"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(AskedDim, _method, _asked_as_well(_method))
for _method in ("__neg__", "__pow__", "max", "rmax", "min", "rmin"):
    setattr(AskedDim, _method, _asked_as_well(_method))


def may_equal(dim: Dim, number: int) -> bool:
    """Says whether a size equals a number at some sizes; True where that is not known."""
    try:
        return not (dim < number or dim > number)
    except InconclusiveDimensionOperation:
        return True


def dim_vars(dim: Dim) -> frozenset[str]:
    """Returns the names of the size variables in a dimension (`2*b*t` -> `{"b", "t"}`)."""
    return frozenset(dim._get_vars()) if isinstance(dim, DimExpr) else frozenset()


def dim_constraints(dim: DimExpr) -> tuple[str, ...]:
    """Returns what is known about the sizes in the scope of a dimension (`("b>=1", "t<=64")`)."""
    return tuple(constraint.debug_str for constraint in dim.scope._explicit_constraints)


def dim_symbol(dim: Dim, name: str) -> Dim | None:
    """Returns the size variable called `name` in the scope of a symbolic dimension, if it is in that dimension."""
    if name not in dim_vars(dim):
        return None
    assert isinstance(dim, DimExpr)
    return DimExpr._from_var(name, dim.scope)


def same_dim(a: Dim, b: Dim) -> bool:
    """Says whether two dimensions are equal for every size (False where that is not known)."""
    return type(a) is type(b) and bool(a == b)


def divide_dim(a: Dim, b: Dim) -> Dim | None:
    """Returns a / b where that is a whole number for every size, else None."""
    if not is_symbolic(a) and not is_symbolic(b):
        return a // b if b and a % b == 0 else None
    quotient = a // b
    return _plain(quotient) if same_dim(_plain(quotient * b), a) else None


def _plain(dim: Dim) -> Dim:
    return dim if dim_vars(dim) or not is_symbolic(dim) else int(dim)


def substitute(value: Any, sizes: Mapping[str, Dim]) -> Any:
    """Replaces size variables in a dimension, or in every dimension inside an equation's parameter."""
    if isinstance(value, DimExpr):
        size = value._evaluate({**sizes})  # type: ignore[dict-item]
        return int(size) if isinstance(size, np.integer) else size
    if isinstance(value, Jaxpr):
        shapes = (substitute(v.aval.shape, sizes) for v in value.invars)
        avals = [jax.ShapeDtypeStruct(s, v.aval.dtype) for s, v in zip(shapes, value.invars, strict=True)]
        return trace(lambda *operands: evaluate_at(value, operands, sizes), *avals)
    if type(value) in (tuple, list):
        return type(value)(substitute(item, sizes) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(substitute(item, sizes) for item in value))
    return value


def bind_at(eqn: JaxprEqn, operands: Sequence[Any], sizes: Mapping[str, Dim]) -> list[Any]:
    """Runs an equation whose parameters mention size variables, with those sizes put in."""
    if eqn.primitive.name == "dim_as_value":
        dim = substitute(eqn.params["dim"], sizes)
        return bind(eqn, operands, dim=dim) if is_symbolic(dim) else [np.asarray(dim, eqn.outvars[0].aval.dtype)]
    if eqn.primitive.name in KERNELS:
        return bind(eqn, operands)
    body = call_body(eqn)
    if body is not None and eqn.primitive.name in INLINED | CUSTOM_DERIVATIVE:
        return evaluate_at(body, operands, sizes)
    if body is not None and is_op(eqn):
        sized = trace(lambda *xs: evaluate_at(body, xs, sizes), *map(aval_of, operands))
        return bind(eqn, operands, call_jaxpr=sized)
    return bind(eqn, operands, **{name: substitute(value, sizes) for name, value in eqn.params.items()})


def evaluate_at(jaxpr: Jaxpr, operands: Sequence[Any], sizes: Mapping[str, Dim], rule: Rule | None = None) -> list[Any]:
    """Evaluates `jaxpr` with size variables replaced; `rule` overrides equations as in `evaluate`."""

    def sized(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        outputs = rule(eqn, values) if rule else None
        return bind_at(eqn, values, sizes) if outputs is None else outputs

    return evaluate(jaxpr, operands, sized)


def live_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that the outputs depend on, in order; effects are not kept."""
    live = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(out in live for out in eqn.outvars):
            kept.append(eqn)
            live.update(atom for atom in eqn.invars if isinstance(atom, Var))
    return kept[::-1]


def drop_dead(jaxpr: Jaxpr, keep: Callable[[int], bool]) -> tuple[Jaxpr, list[int]]:
    """Removes equations and inputs that no output depends on.

    keep: whether to keep an unread input, by its position. Returns the jaxpr and the positions of its inputs.
    """
    live = live_equations(jaxpr)
    alive = {id(eqn) for eqn in live}
    read = {a for eqn in live for a in eqn.invars if isinstance(a, Var)}
    read.update(a for a in jaxpr.outvars if isinstance(a, Var))
    kept = [i for i, v in enumerate(jaxpr.invars) if v in read or keep(i)]

    def rule(eqn: JaxprEqn, _: list[Any]) -> list[Any] | None:
        return None if id(eqn) in alive else [None] * len(eqn.outvars)

    def pruned(*operands: Any) -> list[Any]:
        given = dict(zip(kept, operands, strict=True))
        return evaluate(jaxpr, [given.get(i) for i in range(len(jaxpr.invars))], rule)

    return trace(pruned, *(jaxpr.invars[i].aval for i in kept)), kept


def producers(equations: Iterable[JaxprEqn]) -> dict[Var, JaxprEqn]:
    """Maps each value to the equation that makes it."""
    return {out: eqn for eqn in equations for out in eqn.outvars}


def consumers(equations: Iterable[JaxprEqn]) -> dict[Var, list[JaxprEqn]]:
    """Maps each value to the equations that read it (once per reading operand)."""
    uses: dict[Var, list[JaxprEqn]] = {}
    for eqn in equations:
        for atom in eqn.invars:
            if isinstance(atom, Var):
                uses.setdefault(atom, []).append(eqn)
    return uses
