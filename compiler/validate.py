"""Translation validation: what replaces a part of a graph must give the numbers of what it replaces.

A pass that recognizes a computation by its structure can be fooled by one that only looks alike. So the part between
the replacement's operands and its result is run beside the replacement, on random operands of a small size (the idea
of Pnueli, Siegel and Singerman, 1998, with a test in place of a proof).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from xlathe import jaxpr as ir
from xlathe.rewrite import Replacement


def deviation(
    jaxpr: ir.Jaxpr,
    result: ir.Var,
    replacement: Replacement,
    samples: Mapping[ir.Var, np.ndarray],
    sizes: Mapping[str, int],
) -> float:
    """Returns max|replacement - original| / max|original| over the elements of `result`; inf where one is no number.

    samples: values for the replacement's inputs, of their shapes under `sizes` (size variable -> number). Whatever
    else the original reads is computed where it follows from constants alone and random otherwise.
    """
    region = _Region(jaxpr, samples, sizes)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # others multiply matrices with less precision
        expected = np.asarray(region.value(result), np.float64)
        found = np.asarray(replacement.emit(*(samples[v] for v in replacement.inputs)), np.float64)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return float(error) if np.isfinite(error) else float("inf")


def tolerance(dtypes: Iterable[str]) -> float:
    """Returns the deviation that sums in another order may have: of float32, or of something narrower."""
    return 1e-4 if set(dtypes) <= {"float32", "float64"} else 3e-2


class _Region:
    """Evaluates what lies between samples and a result."""

    def __init__(self, jaxpr: ir.Jaxpr, samples: Mapping[ir.Var, np.ndarray], sizes: Mapping[str, int]) -> None:
        self.producer = ir.producers(jaxpr.eqns)
        self.sizes = sizes
        self.known: dict[ir.Var, Any] = dict(samples)
        self.random = np.random.default_rng(len(samples))
        self.inside = set(samples)  # depends on a sample
        self.outside = set(jaxpr.invars)  # depends on an input of the graph, but on no sample
        for eqn in jaxpr.eqns:
            read = {a for a in eqn.invars if isinstance(a, ir.Var)}
            if read & self.inside:
                self.inside.update(eqn.outvars)
            elif read & self.outside:
                self.outside.update(eqn.outvars)

    def value(self, atom: ir.Atom) -> Any:
        if isinstance(atom, ir.Literal):
            return atom.val
        if atom not in self.known:
            if atom in self.outside:
                self.known[atom] = self._sample(atom)
            else:
                eqn = self.producer[atom]
                outputs = ir.bind_at(eqn, [self.value(a) for a in eqn.invars], self.sizes)
                self.known.update((v, x) for v, x in zip(eqn.outvars, outputs, strict=True) if v not in self.known)
        return self.known[atom]

    def _sample(self, var: ir.Var) -> np.ndarray:
        shape = ir.substitute(tuple(var.aval.shape), self.sizes)
        return self.random.normal(size=shape).astype(var.aval.dtype)
