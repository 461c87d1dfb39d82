"""How much memory it takes to quantize a model section by section: known from shapes, before anything runs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.graph import Graph
from xlathe.passes.observe import check_calibration
from xlathe.passes.quantize.algorithms.gptq import AT_ONCE
from xlathe.passes.quantize.calibrate import IN_ORDER
from xlathe.passes.quantize.method import Method, SectionMethod
from xlathe.passes.quantize.plan import Plan
from xlathe.passes.quantize.stages import Section, Stage, find_sections
from xlathe.passes.quantize.walk import needed_inputs
from xlathe.storage import Format

HALF = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes at the moment when most are held, beside Python, JAX and compiled code.

    weights: float weights of the section; activations: of all rows at a cut point; work: sums of x^T x, what one row
    takes on its way and what a method takes; made: what is finished, 0 where it lies on disk; at: a weight there.
    """

    weights: int
    activations: int
    work: int
    made: int
    at: str

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.work + self.made

    def to_json(self) -> dict[str, Any]:
        """Returns the figures by name, in one entry."""
        return {"peak": dataclasses.asdict(self) | {"total": self.total}}

    def __str__(self) -> str:
        parts = [f"{getattr(self, each) / 1e6:,.0f} {each}" for each in ("weights", "activations", "work", "made")]
        return f"peak about {self.total / 1e6:,.0f} MB beside the process itself, at {self.at} ({', '.join(parts)})"


def footprint(graph: Graph, plan: Plan, batches: Sequence[Any], *, on_disk: bool) -> Footprint | None:
    """Returns what a plan takes whose method goes through the model in order; None where nothing is multiplied.

    on_disk: whether there is a folder for what is finished.
    """
    rows = check_calibration(graph, batches)
    count = sum(len(batch["tokens"]) for batch in rows)
    sizes = {"b": 1, "t": max(batch["tokens"].shape[1] for batch in rows)}
    shapes = {e.name: e.layout.shape(graph.aval(e.name)) for e in plan.entries if e.layout is not None}
    made = 0 if on_disk else sum(entry.after for entry in plan.entries if entry.layout is not None)
    walks = 2 if isinstance(plan.method, SectionMethod) else 1
    found, begin = [], None
    for section in find_sections(graph, list(shapes)):
        output = section.output(graph)
        inputs = [name for name in needed_inputs(graph, begin, [output]) if name not in graph.names("arg")]
        weights = sum(_bytes(graph.aval(name), sizes) for name in inputs) * walks
        held = (section.start, output if walks == 2 else section.end)  # logits are compared, and else not made
        across = max((_bytes(cut.aval, sizes) for cut in held if cut is not None), default=0)
        activations = across * (count + 1) * walks
        for stage in section.stages:
            work = _work(graph, plan, section, stage, shapes, sizes)
            found.append(Footprint(weights, activations, work, made, stage.names[0]))
        begin = section.end
    return max(found, key=lambda each: each.total, default=None)


def _work(
    graph: Graph, plan: Plan, section: Section, stage: Stage, shapes: dict[str, tuple[int, int]], sizes: dict[str, int]
) -> int:
    """Returns the most that is held beside weights and activations from one stage to the next."""
    known = [] if section.start is None else [section.start]
    passing = _passing(ir.equations_between(graph.jaxpr, known, stage.products.values), sizes)
    widths = [shapes[name][1] for name in stage.readers]
    sums = sum(8 * k * k for k in widths)
    rounding = max(_rounding(plan.method, plan.schemes[name].stored, *shapes[name]) for name in stage.names)
    most = sums + max(passing, sum(4 * k * k for k in widths) + 4 * max(widths) ** 2, rounding)
    if not isinstance(plan.method, SectionMethod):
        return most
    through = _passing(ir.equations_between(graph.jaxpr, known, [section.output(graph)]), sizes)
    weights = sum(n * k for n, k in (shapes[name] for name in section.names))
    return max(most + 4 * weights, 3 * through + 48 * weights)  # also best, slope, and on the way back


def _rounding(method: Method, stored: Format, n: int, k: int) -> int:
    """Returns what is held while a weight [n, k] is rounded, it and its copy on the device included."""
    if method.statistics in IN_ORDER:  # the factor in float64 on its way to float32, or what some rows take
        at_once = min(n * k, AT_ONCE) if method.by_rows(stored) else n * k
        return 8 * n * k + max(24 * k * k, 4 * k * k + 24 * at_once + 4 * n * k)
    return 32 * n * k


def _passing(equations: Sequence[ir.JaxprEqn], sizes: dict[str, int]) -> int:
    """Returns the most bytes of results alive at once when equations run in order, none of them fused."""
    last = {a: i for i, eqn in enumerate(equations) for a in eqn.invars if isinstance(a, ir.Var)}
    alive: dict[ir.Var, int] = {}
    most = 0
    for i, eqn in enumerate(equations):
        alive |= {out: _bytes(out.aval, sizes) for out in eqn.outvars}
        body = ir.call_body(eqn)
        inside = _passing(body.eqns, sizes) if body is not None else _widened(eqn, sizes)
        most = max(most, sum(alive.values()) + inside)
        alive = {var: size for var, size in alive.items() if last.get(var, -1) > i}
    return most


def _widened(eqn: ir.JaxprEqn, sizes: dict[str, int]) -> int:
    """Returns the bytes of float32 copies that CPUs make of the operands of a product in 16 bits, and of its result."""
    if eqn.primitive.name != "dot_general" or eqn.outvars[0].aval.dtype.name not in HALF:
        return 0
    return sum(2 * _bytes(atom.aval, sizes) for atom in (*eqn.invars, *eqn.outvars))


def _bytes(aval: Any, sizes: dict[str, int]) -> int:
    return math.prod(ir.substitute(tuple(aval.shape), sizes)) * jnp.dtype(aval.dtype).itemsize
