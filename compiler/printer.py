"""A graph as text: stable, readable, runnable Python, and parseable without running it (`xlathe.parser`).

One line an equation, `result = primitive(operands, parameters)  # type`. Calls are inlined, those with a
custom derivative too; operations of xlathe stay calls. Equal graphs give equal texts.
"""

import ast
import dataclasses
import difflib
import itertools
import json
import keyword
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe import primitives
from xlathe.errors import GraphFileError
from xlathe.graph import Graph
from xlathe.op import Op
from xlathe.ops import OPS

HEADER = '''"""A program of xlathe: one equation a line, the type of its result behind it.

`xlathe.load_graph` parses this file and never runs it. To run it, call `graph` with the arrays of
weights.safetensors and int32 tokens. Custom derivatives are inlined: do not differentiate through it.
"""
'''
_TRANSPARENT = frozenset({"name", "sharding_constraint"})  # remarks for training: they compute nothing
_INDENT = "    "
_WIDTH = 100


def to_text(graph: Graph, *, sources: bool = False, ops: Iterable[Op] = OPS) -> str:
    """Prints a graph as Python.

    sources: adds the model's line (file name only) behind each equation.
    Raises GraphFileError for an equation that the text has no words for (a callback, random numbers).
    """
    printer = _Printer.of(graph, sources, ops)
    return printer.program(graph)


def diff(a: Graph, b: Graph) -> str:
    """Returns the difference of two graphs' texts in unified format; empty for equal ones."""
    before, after = to_text(a).splitlines(), to_text(b).splitlines()
    return "\n".join(difflib.unified_diff(before, after, "before", "after", lineterm=""))


def dim_text(dim: ir.Dim) -> str:
    """Prints a dimension as a Python expression of its size variables (`2*b*t`, `t // 2`)."""
    if not ir.is_symbolic(dim):
        return str(int(dim))
    tree = ast.parse(str(dim).replace("^", "**"), mode="eval")
    return ast.unparse(_Operators().visit(tree))


class _Operators(ast.NodeTransformer):
    """Turns the functions of JAX's dimension expressions into Python's operators."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        arguments = [self.visit(argument) for argument in node.args]
        assert isinstance(node.func, ast.Name)
        if node.func.id == "floordiv":
            return ast.BinOp(arguments[0], ast.FloorDiv(), arguments[1])
        if node.func.id == "mod":
            return ast.BinOp(arguments[0], ast.Mod(), arguments[1])
        return ast.Call(ast.Name(f"{node.func.id}_dim"), arguments, [])


def type_text(aval: Any) -> str:
    """Prints shape and dtype: `float32[b, t, 64]`."""
    return f"{aval.dtype.name}[{', '.join(map(dim_text, aval.shape))}]"


@dataclasses.dataclass(frozen=True)
class _Printer:
    """The state of printing one graph: lines so far, names of values, words used."""

    ops: dict[str, Op]
    sources: bool
    taken: set[str]
    lines: list[str] = dataclasses.field(default_factory=list)
    numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    names: dict[ir.Var, str] = dataclasses.field(default_factory=dict)
    words: set[str] = dataclasses.field(default_factory=set)
    ops_used: set[str] = dataclasses.field(default_factory=set)

    @staticmethod
    def of(graph: Graph, sources: bool, ops: Iterable[Op]) -> "_Printer":
        known = {op.name: op for op in ops}
        return _Printer(
            known, sources, {*primitives.WORDS, *known, "graph", "inf", "nan", *size_names(graph)}
        )

    def program(self, graph: Graph) -> str:
        signature = []
        for item, var in zip(graph.inputs, graph.jaxpr.invars, strict=True):
            self.names[var] = self._fresh(_identifier(item.name))
            annotation = f"{item.kind} {item.name} {type_text(var.aval)}"
            signature.append(f"{_INDENT}{self.names[var]}: {_quoted(annotation)},")
        self._sizes(graph)
        self._equations(graph.jaxpr.eqns, _INDENT)
        self._return(graph.jaxpr.outvars, _INDENT)
        parts = [HEADER, *self._imports(graph), *_size_declaration(graph), "", ""]
        return "\n".join([*parts, "def graph(", *signature, "):", *self.lines, ""])

    def _fresh(self, name: str) -> str:
        count, free = 1, name
        while free in self.taken:
            count += 1
            free = f"{name}_{count}"
        self.taken.add(free)
        return free

    def _imports(self, graph: Graph) -> list[str]:
        lines = ["from jax.export import symbolic_shape", ""] if size_names(graph) else []
        if any(re.search(r"\b(inf|nan)\b", line.partition("#")[0]) for line in self.lines):
            lines.append("from numpy import inf, nan")
        for module, words in (("xlathe.ops", self.ops_used), ("xlathe.primitives", self.words)):
            if words:
                lines.append(_import(module, sorted(words)))
        return [*lines, ""] if size_names(graph) else lines

    def _sizes(self, graph: Graph) -> None:
        known: set[str] = set()
        for var in graph.jaxpr.invars:
            for axis, dim in enumerate(var.aval.shape):
                name = dim_text(dim)
                if ir.is_symbolic(dim) and name.isidentifier() and name not in known:
                    known.add(name)
                    call = f"{self._word('size')}({self.names[var]}, axis={axis})"
                    self.lines.append(f"{_INDENT}{name} = {call}")

    def _word(self, word: str) -> str:
        self.words.add(word)
        return word

    def _equations(self, equations: Sequence[ir.JaxprEqn], indent: str) -> None:
        for eqn in equations:
            self._equation(eqn, indent)

    def _equation(self, eqn: ir.JaxprEqn, indent: str) -> None:
        name, body = eqn.primitive.name, ir.call_body(eqn)
        if name in _TRANSPARENT:
            self.names[eqn.outvars[0]] = self._atom(eqn.invars[0])
        elif name in _REGION_PRINTERS:
            call = _REGION_PRINTERS[name](self, eqn, indent)
            self._assign(eqn, call, True, indent)
        elif ir.is_op(eqn) and self._is_own(eqn):
            op = name.removeprefix(ir.OP_PREFIX)
            self.ops_used.add(op)
            self._assign(eqn, self._call(op, eqn, ir.attributes(eqn)), len(eqn.outvars) > 1, indent)
        elif body is not None and (ir.is_op(eqn) or name in ir.INLINED | ir.CUSTOM_DERIVATIVE):
            self._inline(body, eqn, indent)
        else:
            self._assign(eqn, self._primitive(eqn), eqn.primitive.multiple_results, indent)

    def _is_own(self, eqn: ir.JaxprEqn) -> bool:
        op = self.ops.get(eqn.primitive.name.removeprefix(ir.OP_PREFIX))
        return op is not None and op.recognizes(eqn)

    def _inline(self, body: ir.Jaxpr, eqn: ir.JaxprEqn, indent: str) -> None:
        """Prints a call as the equations of its body, whose values get new names each time."""
        self._constants(body, eqn)
        self.names.update(zip(body.invars, map(self._atom, eqn.invars), strict=True))
        self._equations(body.eqns, indent)
        self.names.update(zip(eqn.outvars, map(self._atom, body.outvars), strict=True))

    def _constants(self, body: ir.Jaxpr, eqn: ir.JaxprEqn) -> None:
        for var, value in zip(body.constvars, body.consts, strict=True):
            if np.ndim(value):
                raise _unprintable(eqn, "holds a constant array")
            self.names[var] = self._number(value, jnp.result_type(value), weak=False)

    def _primitive(self, eqn: ir.JaxprEqn) -> str:
        word = primitives.python_name(eqn.primitive.name)
        if word not in primitives.PARAMETERS or eqn.effects:
            raise _unprintable(eqn, "has no form in a saved graph")
        known = primitives.PARAMETERS[word]
        shown = {key: value for key, value in eqn.params.items() if key in known}
        return self._call(
            self._word(word), eqn, {k: v for k, v in shown.items() if not primitives.is_default(word, k, v)}
        )

    def _call(self, word: str, eqn: ir.JaxprEqn, params: dict[str, Any]) -> str:
        operands = [self._atom(atom) for atom in eqn.invars]
        try:
            keywords = [f"{key}={self._value(value)}" for key, value in params.items()]
        except TypeError as error:
            raise _unprintable(eqn, f"has a parameter without a form in a saved graph: {error}") from None
        return f"{word}({', '.join(operands + keywords)})"

    def _assign(self, eqn: ir.JaxprEqn, call: str, several: bool, indent: str) -> None:
        for out in eqn.outvars:
            self.names[out] = self._fresh(f"x{next(self.numbers)}")
        targets = _tuple([self.names[out] for out in eqn.outvars]) if several else self.names[eqn.outvars[0]]
        comment = ", ".join(type_text(out.aval) for out in eqn.outvars)
        if self.sources:
            line = ir.source_line(eqn).partition(", called from")[0]
            comment += f"  {line.rpartition('/')[2]}"
        self.lines.append(f"{indent}{targets} = {call}  # {comment}")

    def _return(self, atoms: Sequence[ir.Atom], indent: str) -> None:
        self.lines.append(f"{indent}return {_tuple([self._atom(a) for a in atoms])}")

    def _region(
        self, kind: str, body: ir.Jaxpr, outer: Sequence[ir.Atom], eqn: ir.JaxprEqn, indent: str
    ) -> str:
        """Prints a nested function; the body's first inputs are the values `outer` of the enclosing one."""
        name = self._fresh(kind)
        self._constants(body, eqn)
        self.names.update(zip(body.invars, map(self._atom, outer), strict=False))
        own = body.invars[len(outer) :]
        for var in own:
            self.names[var] = self._fresh(f"x{next(self.numbers)}")
        types = ", ".join(type_text(var.aval) for var in own)
        self.lines.append(f"{indent}def {name}({', '.join(self.names[v] for v in own)}):  # {types}")
        self._equations(body.eqns, indent + _INDENT)
        self._return(body.outvars, indent + _INDENT)
        return name

    def _scan(self, eqn: ir.JaxprEqn, indent: str) -> str:
        constants, carried = ir.scan_parts(eqn)
        body = self._region("body", eqn.params["jaxpr"], eqn.invars[:constants], eqn, indent)
        init = self._atoms(eqn.invars[constants : constants + carried])
        xs = self._atoms(eqn.invars[constants + carried :])
        options = [f"{key}={self._value(eqn.params[key])}" for key in ("length", "reverse", "unroll")]
        return f"{self._word('scan')}({body}, {init}, {xs}, {', '.join(options)})"

    def _while(self, eqn: ir.JaxprEqn, indent: str) -> str:
        held, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        condition = self._region("condition", eqn.params["cond_jaxpr"], eqn.invars[:held], eqn, indent)
        outer = eqn.invars[held : held + of_body]
        body = self._region("body", eqn.params["body_jaxpr"], outer, eqn, indent)
        return f"{self._word('while_loop')}({condition}, {body}, {self._atoms(eqn.invars[held + of_body :])})"

    def _switch(self, eqn: ir.JaxprEqn, indent: str) -> str:
        branches = [self._region("branch", branch, (), eqn, indent) for branch in eqn.params["branches"]]
        operands = [self._atom(a) for a in eqn.invars]
        return f"{self._word('switch')}({', '.join([operands[0], _tuple(branches), *operands[1:]])})"

    def _atoms(self, atoms: Sequence[ir.Atom]) -> str:
        return _tuple([self._atom(atom) for atom in atoms])

    def _atom(self, atom: ir.Atom) -> str:
        if isinstance(atom, ir.Literal):
            return self._number(atom.val, atom.aval.dtype, atom.aval.weak_type)
        return self.names[atom]

    def _number(self, value: Any, dtype: Any, weak: bool) -> str:
        """Prints a scalar in the fewest digits that give the same bits; a weakly typed one has no dtype."""
        exact = np.asarray(value, dtype).reshape(-1)[0]
        if dtype.kind == "c":
            text = f"{float(exact.real)!r}, {float(exact.imag)!r}"
        elif jnp.issubdtype(dtype, jnp.floating):
            text = repr(float(value)) if weak and isinstance(value, float) else str(exact)
        else:
            text = str(bool(exact) if dtype.kind == "b" else int(exact))
        return text if dtype.kind == "b" or weak else f"{self._word(dtype.name)}({text})"

    def _value(self, value: Any) -> str:
        """Prints a parameter; raises TypeError for one that is no number, name, dimension or tuple."""
        if value is None or isinstance(value, bool):
            return repr(value)
        if isinstance(value, str):
            return _quoted(value)
        if type(value).__name__ in primitives.ENUMS:
            return f"{self._word(type(value).__name__)}.{value.name}"
        if isinstance(value, int | np.integer) or ir.is_symbolic(value):
            return dim_text(value)
        if isinstance(value, float | np.floating):
            return repr(float(value))
        if type(value).__name__ in primitives.STRUCTURES:
            fields = primitives.fields_of(value)
            listed = ", ".join(f"{key}={self._value(item)}" for key, item in fields.items())
            return f"{self._word(type(value).__name__)}({listed})"
        if isinstance(value, tuple | list):
            return _tuple([self._value(item) for item in value])
        if isinstance(value, np.dtype) and value.name in primitives.DTYPES:
            return self._word(value.name)
        raise TypeError(f"{type(value).__name__} {value!r}")


_REGION_PRINTERS: dict[str, Callable[[_Printer, ir.JaxprEqn, str], str]] = {
    "scan": _Printer._scan,
    "while": _Printer._while,
    "cond": _Printer._switch,
}


def _import(module: str, words: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(words)}"
    if len(line) <= _WIDTH:
        return line
    listed = textwrap.fill(", ".join(words), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return f"from {module} import (\n{listed},\n)"


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def size_names(graph: Graph) -> list[str]:
    """Returns the size variables of a graph's inputs, sorted."""
    return sorted({name for var in graph.jaxpr.invars for dim in var.aval.shape for name in ir.dim_vars(dim)})


def _size_declaration(graph: Graph) -> list[str]:
    names = size_names(graph)
    if not names:
        return []
    dims = (dim for var in graph.jaxpr.invars for dim in var.aval.shape if ir.is_symbolic(dim))
    listed, constraints = ", ".join(names), ", ".join(map(_quoted, ir.dim_constraints(next(dims))))
    targets = f"{listed}," if len(names) == 1 else listed
    return [f"{targets} = symbolic_shape({_quoted(listed)}, constraints=[{constraints}])"]


def _identifier(name: str) -> str:
    identifier = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    return f"_{identifier}" if identifier[0].isdigit() or keyword.iskeyword(identifier) else identifier


def _unprintable(eqn: ir.JaxprEqn, reason: str) -> GraphFileError:
    return GraphFileError(f"{eqn.primitive.name} at {ir.source_line(eqn)} {reason}")
