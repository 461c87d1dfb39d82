"""Reading printed graphs: what is no printed graph is refused with its line, and nothing is ever executed."""

import contextlib

import numpy as np
import pytest

from tests.graphs import graph_of
from xlathe.errors import GraphFileError
from xlathe.parser import MAX_CHARACTERS, parse
from xlathe.printer import to_text

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
GOOD = to_text(graph_of(lambda p, ids: p["e"][ids] @ p["e"].T, e=E))
HEADER, BODY = GOOD.split("):\n")
RETURN = BODY.splitlines()[-1]


def with_line(line: str) -> str:
    """The good program with one more line before its return."""
    return GOOD.replace(RETURN, f"    {line}\n{RETURN}")


def test_the_good_one_is_good():
    parse(GOOD)
    parse(with_line("y = tanh(e)"))


HOSTILE = {
    "call of a builtin": ("y = open('/etc/passwd')", "unknown name 'open'"),
    "import function": ("y = __import__('os')", "unknown name '__import__'"),
    "import": ("import os", "expected an equation"),
    "attribute call": ("y = tokens.__class__()", "by name"),
    "attribute in a parameter": ("y = tanh(e, dim=tokens.__class__)", "expected a number"),
    "enum member that is none": ("y = tanh(e, dim=Precision.__init__)", "unknown name '__init__'"),
    "lambda": ("y = (lambda: 1)()", "by name"),
    "comprehension": ("y = tanh([e for e in (1,)])", "expected a number"),
    "subscript": ("y = tanh(e[0])", "expected a number"),
    "f-string": ("y = tanh(f'{tokens}')", "expected a number"),
    "starred": ("y = tanh(*tokens)", "expected a number"),
    "double starred": ("y = tanh(e, **tokens)", "by name|once each"),
    "walrus": ("y = tanh((z := e))", "expected a number"),
    "expression": ("tanh(e)", "expected an equation"),
    "loop": ("while True: pass", "expected an equation"),
    "delete": ("del tokens", "expected an equation"),
    "decorator": ("@tanh\n    def f(a): return (a,)", "plain arguments"),
    "default": ("def f(a=open('x')): return (a,)", "plain arguments"),
    "raise": ("raise SystemExit", "expected an equation"),
    "two targets": ("y = z = tanh(e)", "expected an equation"),
    "attribute target": ("tokens.x = tanh(e)", "new names"),
    "name used again": ("e = tanh(e)", "new names"),
    "unknown primitive": ("y = tanhh(e)", "unknown name 'tanhh'; did you mean 'tanh'"),
    "unknown parameter": ("y = reduce_sum(e, axs=(0,))", "no parameter 'axs'; did you mean 'axes'"),
    "missing parameter": ("y = reduce_sum(e)", "needs the parameter 'axes'"),
    "unknown value": ("y = tanh(x99)", "unknown name 'x99'"),
    "unknown dtype": ("y = convert_element_type(e, new_dtype=float23)", "unknown name 'float23'; did you mean"),
    "wrong type": ("y = convert_element_type(e, new_dtype='flaot32')", "line"),
    "wrong shape": ("y = reshape(e, new_sizes=(b, 999))", "line"),
    "too few operands": ("y = add(e)", "line"),
    "wrong number of results": ("(y, z) = tanh(e)", "number of results"),
    "huge number": ("y = iota(dtype=int32, shape=(9223372036854775808,), dimension=0)", "expected a number"),
    "huge power": ("y = iota(dtype=int32, shape=(t**99999,), dimension=0)", "power"),
    "huge product": ("y = iota(dtype=int32, shape=(9000000000000000000*9,), dimension=0)", "beyond"),
    "division by zero": ("y = iota(dtype=int32, shape=(4 // 0,), dimension=0)", "zero"),
    "a float as a size": ("y = iota(dtype=int32, shape=(1e99,), dimension=0)", "line"),
    "negative size": ("y = iota(dtype=int32, shape=(-4,), dimension=0)", "line"),
    "string operand": ("y = tanh('x')", "expected a value"),
    "bytes": ("y = tanh(b'x')", "expected a number"),
    "region that is none": ("(y,) = scan(tanh, (e,), (), length=3, reverse=False, unroll=1)", "unknown name 'tanh'"),
    "size of another axis": ("t2 = size(tokens, axis=7)", "size"),
    "scan without operands": ("(y,) = scan()", "line"),
    "recursion": ("def f(a):\n        c = while_loop(f, f, (a,))\n        return (c,)\n    y = while_loop(f, f, (e,))",
                  "unknown name 'f'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_line(name):
    line, reason = HOSTILE[name]
    with pytest.raises(GraphFileError, match=reason) as caught:
        parse(with_line(line))
    assert "line " in str(caught.value)


OTHER_TEXTS = {
    "empty": ("", "no function `graph`"),
    "not Python": ("def graph(:", "line 1"),
    "null byte": (GOOD + "\0", "cannot be parsed|null"),
    "deep parentheses": (with_line(f"y = tanh({'(' * 5000}e{')' * 5000})"), "line|parsed"),
    "deep signs": (with_line(f"y = tanh({'-' * 100_000}1)"), "parsed"),
    "deep sums": (with_line("y = tanh(" + "+".join(["1"] * 100_000) + ")"), "parsed"),
    "deep attributes": (with_line("y = tanh(e" + ".a" * 100_000 + ")"), "parsed"),
    "deep tuples": (with_line(f"y = tanh(e, dim={'(' * 150}1{',)' * 150})"), "line|parsed"),
    "too many digits": (with_line(f"y = tanh({'9' * 5000})"), "line|parsed"),
    "too long": (" " * (MAX_CHARACTERS + 1), "characters"),
    "statement before": ("import os\n" + GOOD, "line 1"),
    "call before": ("print(1)\n" + GOOD, "line 1"),
    "foreign import": ("from os import system\n" + GOOD, "line 1"),
    "relative import": ("from . import primitives\n" + GOOD, "line 1"),
    "two functions": (GOOD + GOOD.partition("def ")[1] + GOOD.partition("def ")[2], "line"),
    "class": ("class graph: pass", "line 1"),
    "no return": (GOOD.replace(RETURN, ""), "ends with `return"),
    "wrong constraint": (GOOD.replace("t <= 16", "t <= 16; import os"), "malformed sizes"),
    "contradiction": (GOOD.replace("t >= 1", "t >= 99"), "line"),
    "unknown size": (GOOD.replace('int32[b, t]"', 'int32[b, q]"'), "unknown name 'q'"),
    "unknown kind": (GOOD.replace('"weight ', '"wait '), "unknown kind 'wait'; did you mean"),
    "unknown dtype": (GOOD.replace("float32[11, 4]", "flaot32[11, 4]"), "unknown dtype 'flaot32'; did you mean"),
    "no annotation": (GOOD.replace('tokens: "arg tokens int32[b, t]"', "tokens"), "needs an annotation"),
    "hostile shape": (GOOD.replace("int32[b, t]", "int32[open('x'), t]"), "unknown name"),
    "argument twice": (GOOD.replace('    tokens: "', '    e: "weight e float32[11, 4]",\n    tokens: "'), "line"),
    "name twice": (GOOD.replace('    tokens: "', '    f: "weight e float32[11, 4]",\n    tokens: "'), "used twice"),
}


@pytest.mark.parametrize("name", OTHER_TEXTS)
def test_refused_text(name):
    text, reason = OTHER_TEXTS[name]
    with pytest.raises(GraphFileError, match=reason):
        parse(text)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_text_is_read_or_refused(seed):
    """Expected: no other exception than GraphFileError, whatever byte changes."""
    rng = np.random.default_rng(seed)
    text = list(GOOD)
    for _ in range(rng.integers(1, 4)):
        text[rng.integers(len(text))] = chr(rng.integers(32, 127))
    with contextlib.suppress(GraphFileError):
        parse("".join(text))
