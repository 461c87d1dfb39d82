"""Which weight gets which scheme: the rules of a quantizer, applied to a graph before anything is computed."""

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.quantize.experts import Experts, find_experts
from xlathe.passes.quantize.flops import count_flops
from xlathe.passes.quantize.method import Method
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.uses import Layout, plan_weights

SHOWN = 5  # near misses, or names, in a message


@dataclasses.dataclass(frozen=True)
class Rule:
    """Weights whose names match a regular expression in full get a scheme; None: they stay as they are."""

    weights: str
    scheme: Scheme | None

    @staticmethod
    def parse(weights: str, scheme: str) -> "Rule":
        """Reads the text of a scheme, or `none`. Raises OptionError for a text, or an expression, that is none."""
        try:
            re.compile(weights)
        except re.error as error:
            raise OptionError(f"quantize: weights={weights!r} is no regular expression: {error}") from None
        return Rule(weights, None if scheme == "none" else Scheme.parse(scheme))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight of a plan. scheme, layout: None where it stays as it is. before, after: bytes. zeros: how many of its
    numbers are set to zero; unstored: how many of these its format leaves out."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    layout: Layout | None
    before: int
    after: int
    zeros: int = 0
    unstored: int = 0

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.after / max(math.prod(self.shape), 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a quantizer will do to a graph. entries: every weight, in the graph's order; misses: why weights that a rule
    names stay as they are. flops: a token, and without those on zeros (`count_flops`), where that is known."""

    entries: tuple[Entry, ...]
    experts: tuple[Experts, ...]
    method: Method
    misses: tuple[str, ...]
    flops: tuple[int, int] | None

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of every weight that gets one."""
        return {entry.name: entry.scheme for entry in self.entries if entry.scheme is not None}

    def to_json(self) -> str:
        """Returns one object: method, tensors, and the totals."""
        tensors = [
            {"name": e.name, "shape": e.shape, "scheme": str(e.scheme) if e.scheme else None, "bits": e.bits}
            | {"bytes_before": e.before, "bytes_after": e.after, "zeros": e.zeros, "unstored": e.unstored}
            for e in self.entries
        ]
        return json.dumps({"method": str(self.method), "tensors": tensors} | self._totals(), indent=2)

    def __str__(self) -> str:
        """A line a weight, and the totals."""
        table = Table("weight", "shape", "scheme", box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("bits a weight", "bytes before", "after"):
            table.add_column(heading, justify="right")
        for e in self.entries:
            shape = "x".join(map(str, e.shape))
            table.add_row(e.name, shape, str(e.scheme or ""), f"{e.bits:.3f}", f"{e.before:,}", f"{e.after:,}")
        console = Console(file=io.StringIO(), width=200, color_system=None, markup=False, emoji=False)
        with console.capture() as captured:
            console.print(table)
        lines = [line.rstrip() for line in captured.get().strip("\n").splitlines()]
        total = self._totals()
        lines.append(
            f"{len(self.schemes)} of {len(self.entries)} weights by {self.method}: {total['bytes_before']:,} bytes -> "
            f"{total['bytes_after']:,}, {total['bits']:.3f} bits a weight"
        )
        return "\n".join([*lines, *self.remarks, *(f"nearly: {miss}" for miss in self.misses)])

    @property
    def remarks(self) -> tuple[str, ...]:
        """What zeros save and what they do not, where there are any."""
        total = self._totals()
        if not total["zeros"]:
            return ()
        counted = self.flops and f"nominally {self.flops[1]:,} of {self.flops[0]:,} flops a token, but "
        return (
            f"zeros: {total['zeros']:,} of {total['weights']:,} weights, {total['unstored']:,} of them not stored; "
            f"{counted or ''}XLA multiplies zeros like others: a mask brings no speed",
        )

    def _totals(self) -> dict[str, Any]:
        after = sum(e.after for e in self.entries)
        count = sum(math.prod(e.shape) for e in self.entries)
        before = sum(e.before for e in self.entries)
        zeros, unstored = (sum(getattr(e, name) for e in self.entries) for name in ("zeros", "unstored"))
        dense, nominal = self.flops or (None, None)
        return {"bits": 8 * after / max(count, 1), "bytes_before": before, "bytes_after": after} | {
            "weights": count, "zeros": zeros, "unstored": unstored, "flops": dense, "nominal_flops": nominal,
        }  # fmt: skip


def make_plan(graph: Graph, rules: Sequence[Rule], method: Method) -> Plan:
    """Returns what rules mean for a graph; the first that matches a weight's name decides.

    Raises OptionError for a rule that decides nothing, and for a weight that its format, or a format that the method,
    does not take.
    """
    names = graph.names("weight")
    decided = {name: next((rule for rule in rules if re.fullmatch(rule.weights, name)), None) for name in names}
    wanted = {name: rule.scheme for name, rule in decided.items() if rule is not None and rule.scheme is not None}
    layouts, misses = plan_weights(graph, list(wanted))
    experts, refused = find_experts(graph, wanted)
    layouts |= {name: group.layout for group in experts for name in group.names}
    misses += refused
    for rule in rules:
        _check_rule(rule, decided, layouts, misses)
    for name, layout in layouts.items():
        wanted[name].check(name, graph.aval(name).shape, *layout.shape(graph.aval(name)))
        if reason := method.refusal(wanted[name].stored):
            raise OptionError(f"quantize: method={method} of {name}: {reason}")
    entries = tuple(_entry(graph, name, wanted.get(name), layouts.get(name), method) for name in names)
    zeros = {e.name: method.zeros(e.scheme.stored) for e in entries if e.scheme is not None and e.zeros}
    return Plan(entries, tuple(experts), method, misses, count_flops(graph, zeros, experts))


def _entry(graph: Graph, name: str, scheme: Scheme | None, layout: Layout | None, method: Method) -> Entry:
    aval = graph.aval(name)
    before = math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize
    if scheme is None or layout is None:
        return Entry(name, tuple(aval.shape), None, None, before, before)
    after = sum(part.nbytes for part in scheme.parts(*layout.shape(aval)).values())
    zeros, unstored = (round(share * aval.size) for share in (method.zeros(scheme.stored), scheme.stored.sparsity))
    return Entry(name, tuple(aval.shape), scheme, layout, before, after, zeros, unstored)


def rules_of(schemes: Mapping[str, Scheme]) -> tuple[tuple[str, str], ...]:
    """Returns rules, as `Quantize` takes them, that give weights these schemes and leave others as they are."""
    names: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(str(scheme), []).append(re.escape(name))
    return tuple(("|".join(each), scheme) for scheme, each in names.items()) or ((".*", "none"),)


def _check_rule(rule: Rule, decided: Mapping[str, Rule | None], layouts: Mapping[str, Layout], misses: Any) -> None:
    """Raises OptionError where a rule decides nothing."""
    own = [name for name, by in decided.items() if by is rule]
    if any(name in layouts for name in own) or (own and rule.scheme is None):
        return
    earlier = [name for name in decided if re.fullmatch(rule.weights, name)]
    if not own and earlier:
        why = f"decides nothing: rules before it decide all that it matches, {_listed(earlier)}"
    else:
        why = "matches no weight" + " that is multiplied with activations" * (rule.scheme is not None)
        nearly = [miss for miss in misses if miss.partition(":")[0] in own]
        why += f"; {_nearly(nearly) or 'the graph has ' + _listed(list(decided))}"
    raise OptionError(f"quantize: weights={rule.weights!r} {why}")


def _nearly(misses: Sequence[str]) -> str:
    more = [f"and {len(misses) - SHOWN} more"] if len(misses) > SHOWN else []
    return "nearly: " + "; ".join([*misses[:SHOWN], *more]) if misses else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])
