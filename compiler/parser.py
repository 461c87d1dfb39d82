"""Reads a printed graph (`xlathe.printer`) without running it.

The text is parsed by Python's `ast`, and each node is checked against a short list of forms and names before
it is followed. Equations are re-made by tracing, so that JAX checks every shape and dtype again.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.export import symbolic_shape

from xlathe import jaxpr as ir
from xlathe import primitives
from xlathe.errors import GraphFileError, did_you_mean
from xlathe.graph import Input, Kind
from xlathe.op import Op
from xlathe.ops import OPS

MAX_CHARACTERS = 1 << 25
_MODULES = frozenset({"jax.export", "numpy", "xlathe.ops", "xlathe.primitives"})
_ANNOTATION = re.compile(r"(\w+) (.+) (\w+)\[(.*)\]", re.ASCII)
_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
_LARGEST = 1 << 63
_HIGHEST_POWER = 8


def parse(text: str, ops: Iterable[Op] = OPS) -> tuple[ir.Jaxpr, tuple[Input, ...]]:
    """Returns the program and the named inputs of a printed graph.

    ops: the operations that the text may name.
    Raises GraphFileError, with the line, for anything that `to_text` would not have written.
    """
    if len(text) > MAX_CHARACTERS:
        raise GraphFileError(f"{len(text)} characters; a printed graph has at most {MAX_CHARACTERS}")
    try:
        return _program(ast.parse(text).body, {op.name: op for op in ops})
    except GraphFileError as error:
        raise GraphFileError(str(error)) from None  # without what JAX notes on errors that pass through it
    except SyntaxError as error:
        raise GraphFileError(f"line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, too deeply nested
        raise GraphFileError(f"the text cannot be parsed: {error}") from None


def _program(statements: Sequence[ast.stmt], ops: Mapping[str, Op]) -> tuple[ir.Jaxpr, tuple[Input, ...]]:
    dims: dict[str, ir.Dim] = {}
    function = None
    for statement in statements:
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                continue
            case ast.ImportFrom(module=module, level=0) if module in _MODULES:
                continue
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Call() as call) if not dims:
                dims = _sizes(names, call)
            case ast.FunctionDef(name="graph", decorator_list=[]) if function is None:
                function = statement
            case _:
                raise _refusal(statement, "a printed graph has imports, sizes and one function `graph`")
    if function is None:
        raise GraphFileError("there is no function `graph`")
    return _graph(function, dims, ops)


def _sizes(names: list[ast.expr], call: ast.Call) -> dict[str, ir.Dim]:
    """Reads `b, t = symbolic_shape("b, t", constraints=["b>=1"])`."""
    match call:
        case ast.Call(
            func=ast.Name(id="symbolic_shape"),
            args=[ast.Constant(value=str(spec))],
            keywords=[ast.keyword(arg="constraints", value=ast.List(elts=constraints))],
        ) if all(isinstance(c, ast.Constant) and isinstance(c.value, str) for c in constraints):
            listed = [c.value for c in constraints]  # type: ignore[attr-defined]
        case _:
            raise _refusal(call, "sizes are declared by symbolic_shape(names, constraints=[...])")
    targets = [name.id for name in names if isinstance(name, ast.Name)]
    if ", ".join(targets) != spec or len(targets) != len(names):
        raise _refusal(call, f"the sizes {targets} are declared as {spec!r}")
    try:
        return dict(zip(targets, symbolic_shape(spec, constraints=listed), strict=True))
    except Exception as error:  # JAX raises several kinds for malformed specifications
        raise _refusal(call, f"malformed sizes: {_first_line(error)}") from None


def _graph(
    function: ast.FunctionDef, dims: Mapping[str, ir.Dim], ops: Mapping[str, Op]
) -> tuple[ir.Jaxpr, tuple[Input, ...]]:
    arguments = _arguments(function)
    inputs, avals = [], []
    for argument in arguments:
        item, aval = _input(argument, dims)
        inputs.append(item)
        avals.append(aval)
    names = [argument.arg for argument in arguments]
    _check_unique(function, names)
    _check_unique(function, [item.name for item in inputs])

    def traced(*operands: Any) -> tuple[Any, ...]:
        return _Body(ops, dims, dict(zip(names, operands, strict=True)), {}).run(function.body)

    return ir.trace(traced, *avals), tuple(inputs)


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    a = function.args
    if a.posonlyargs or a.vararg or a.kwonlyargs or a.kwarg or a.defaults or function.decorator_list:
        raise _refusal(function, "functions have plain arguments only")
    return a.args


def _input(argument: ast.arg, dims: Mapping[str, ir.Dim]) -> tuple[Input, jax.ShapeDtypeStruct]:
    """Reads an argument's annotation, `"weight layers/0/up float32[64, 256]"`."""
    match argument.annotation:
        case ast.Constant(value=str(text)) if found := _ANNOTATION.fullmatch(text):
            kind, name, dtype, shape = found.groups()
        case _:
            raise _refusal(
                argument, f"the input {argument.arg!r} needs an annotation 'kind name dtype[shape]'"
            )
    if kind not in get_args(Kind):
        raise _refusal(argument, f"unknown kind {kind!r}{did_you_mean(kind, get_args(Kind))}")
    if dtype not in primitives.DTYPES:
        raise _refusal(argument, f"unknown dtype {dtype!r}{did_you_mean(dtype, primitives.DTYPES)}")
    sizes = _Values(dims).value(_expression(argument, f"({shape},)" if shape else "()"))
    return Input(name, kind), jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))  # type: ignore[arg-type]


def _expression(node: ast.AST, text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise _refusal(node, f"malformed shape {text!r}") from None
    return ast.copy_location(ast.fix_missing_locations(tree), node)


@dataclasses.dataclass(frozen=True)
class _Values:
    """Reads parameters: numbers, strings, tuples, dimensions, dtypes and JAX's parameter structures."""

    dims: Mapping[str, ir.Dim]

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | float() | str()):
                return node.value
            case ast.Constant(value=int() as number) if abs(number) < _LARGEST:
                return number
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.number(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._arithmetic(node, op, self.number(left), self.number(right))
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Attribute(value=ast.Name(id=enum), attr=member) if enum in primitives.ENUMS:
                if member not in primitives.ENUMS[enum].__members__:
                    raise _unknown(node, member, primitives.ENUMS[enum].__members__)
                return getattr(primitives.ENUMS[enum], member)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self._structure(node, name, args, keywords)
        raise _refusal(node, "expected a number, a string, a tuple, a dtype or a dimension")

    def _name(self, node: ast.Name, name: str) -> Any:
        for table in (self.dims, primitives.DTYPES, {"inf": math.inf, "nan": math.nan}):
            if name in table:
                return table[name]
        raise _unknown(node, name, [*self.dims, *primitives.DTYPES])

    def number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if isinstance(value, bool) or not (isinstance(value, int | float) or ir.is_symbolic(value)):
            raise _refusal(node, "expected a number or a dimension")
        return value

    def _arithmetic(self, node: ast.expr, op: ast.operator, a: Any, b: Any) -> Any:
        if isinstance(op, ast.Pow) and not (isinstance(b, int) and 0 <= b <= _HIGHEST_POWER):
            raise _refusal(node, f"a power must be a number from 0 to {_HIGHEST_POWER}")
        try:
            result = _ARITHMETIC[type(op)](a, b)
        except ArithmeticError as error:
            raise _refusal(node, str(error)) from None
        if isinstance(result, int) and abs(result) >= _LARGEST:
            raise _refusal(node, f"a number beyond {_LARGEST}")
        return result

    def _structure(self, node: ast.Call, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        if name in primitives.DIM_FUNCTIONS and not keywords and len(args) == 2:
            return primitives.DIM_FUNCTIONS[name](*map(self.number, args))
        if name not in primitives.STRUCTURES or args:
            raise _unknown(node, name, primitives.STRUCTURES)
        return _guarded(node, lambda: primitives.STRUCTURES[name](**self.keywords(keywords)))

    def keywords(self, keywords: list[ast.keyword]) -> dict[str, Any]:
        named = {k.arg: self.value(k.value) for k in keywords if k.arg is not None}
        if len(named) != len(keywords):
            raise _refusal(keywords[0], "parameters are written once each, by name")
        return named


@dataclasses.dataclass(frozen=True)
class _Body:
    """Follows the statements of one function while JAX traces what they bind."""

    ops: Mapping[str, Op]
    dims: Mapping[str, ir.Dim]
    values: dict[str, Any]
    regions: dict[str, Callable[..., tuple[Any, ...]]]

    def run(self, statements: Sequence[ast.stmt]) -> tuple[Any, ...]:
        for statement in statements[:-1]:
            match statement:
                case ast.Assign(targets=[target], value=ast.Call() as call):
                    self._assign(target, call)
                case ast.FunctionDef():
                    self._define(statement)
                case _:
                    raise _refusal(
                        statement, "expected an equation `x = primitive(...)` or a nested function"
                    )
        match statements[-1]:
            case ast.Return(value=ast.Tuple(elts=results)):
                return tuple(self.operand(result) for result in results)
        raise _refusal(statements[-1], "a function ends with `return (...,)`")

    def _assign(self, target: ast.expr, call: ast.Call) -> None:
        if isinstance(call.func, ast.Name) and call.func.id == "size":
            self._check_size(target, call)
            return
        result = self._call(call)
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        results = result if isinstance(target, ast.Tuple) else (result,)
        if not isinstance(results, tuple) or len(targets) != len(results) or isinstance(results[0], tuple):
            raise _refusal(call, f"the number of results is not {len(targets)}")
        for name, value in zip(targets, results, strict=True):
            if not isinstance(name, ast.Name) or name.id in self.values or name.id in self.dims:
                raise _refusal(name, "results are new names")
            self.values[name.id] = value

    def _check_size(self, target: ast.expr, call: ast.Call) -> None:
        match target, call:
            case (
                ast.Name(id=dim),
                ast.Call(
                    args=[ast.Name(id=name)],
                    keywords=[ast.keyword(arg="axis", value=ast.Constant(value=int(axis)))],
                ),
            ) if dim in self.dims and name in self.values and 0 <= axis < self.values[name].ndim:
                if ir.same_dim(self.values[name].shape[axis], self.dims[dim]):
                    return
        raise _refusal(call, "expected `size = size(input, axis=i)` of an axis with that size")

    def _define(self, function: ast.FunctionDef) -> None:
        names = [argument.arg for argument in _arguments(function)]
        _check_unique(function, names)
        outer = dict(self.regions)

        def region(*operands: Any) -> tuple[Any, ...]:
            if len(operands) != len(names):
                raise _refusal(function, f"takes {len(names)} values, is given {len(operands)}")
            inner = {**self.values, **dict(zip(names, operands, strict=True))}
            return _Body(self.ops, self.dims, inner, dict(outer)).run(function.body)

        self.regions[function.name] = region

    def _call(self, call: ast.Call) -> Any:
        if not isinstance(call.func, ast.Name):
            raise _refusal(call, "only primitives and operations are called, by name")
        name = call.func.id
        if name not in self.ops and name not in primitives.PARAMETERS and name not in primitives.REGIONS:
            raise _unknown(call, name, [*primitives.PARAMETERS, *self.ops, *primitives.REGIONS])
        params = _Values(self.dims).keywords(call.keywords)
        if name in primitives.REGIONS:
            grouped = [self._grouped(argument) for argument in call.args]
            return _guarded(call, lambda: primitives.REGIONS[name](*grouped, **params))
        operands = [self.operand(argument) for argument in call.args]
        if name in self.ops:
            return _guarded(call, lambda: self.ops[name](*operands, **params))
        return _guarded(call, lambda: primitives.apply(name, *operands, **params))

    def _grouped(self, node: ast.expr) -> Any:
        """Reads an operand of a region: a nested function, a value, or a tuple of those."""
        if isinstance(node, ast.Tuple):
            return tuple(self._grouped(item) for item in node.elts)
        if isinstance(node, ast.Name) and node.id in self.regions:
            return self.regions[node.id]
        return self.operand(node)

    def operand(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if (
                name in primitives.DTYPES and args
            ):
                numbers = [_Values({}).number(argument) for argument in args]
                return _guarded(node, lambda: primitives.DTYPES[name](*numbers))
            case ast.Name(id=name) if name not in ("inf", "nan"):
                raise _unknown(node, name, self.values)
        value = _Values({}).value(node)
        if not isinstance(value, bool | int | float):
            raise _refusal(node, "expected a value or a number")
        return value


def _guarded(node: ast.AST, make: Callable[[], Any]) -> Any:
    """Runs `make`, whose arguments come from the text; whatever JAX objects to is the text's fault."""
    try:
        return make()
    except GraphFileError:
        raise
    except Exception as error:
        raise _refusal(node, _first_line(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_unique(node: ast.AST, names: list[str]) -> None:
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise _refusal(node, f"the name {repeated[0]!r} is used twice")


def _unknown(node: ast.AST, name: str, known: Iterable[str]) -> GraphFileError:
    return _refusal(node, f"unknown name {name!r}{did_you_mean(name, known)}")


def _refusal(node: ast.AST, reason: str) -> GraphFileError:
    return GraphFileError(f"line {getattr(node, 'lineno', '?')}: {reason}")
