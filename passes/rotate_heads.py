"""Turn the features of every head, so that none of them is an outlier where a cache is rounded."""

import dataclasses
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from xlathe import jaxpr as ir
from xlathe.graph import Graph, Record
from xlathe.pipeline import REASSOCIATED, Context, Keeps, Pass, is_forward


@final
@dataclasses.dataclass(frozen=True)
class RotateHeads(Pass):
    """Multiplies queries, keys and values by a Hadamard matrix as the program runs, and turns the result back.

    Scores and results stay (in 16 bits but for one more rounding), but a cache that is derived afterwards holds turned
    keys and values: a loud feature is spread over all of a head, and costs the others no precision (QuaRot, Ashkboos et
    al. 2024, arXiv 2404.00456, section 4: keys are turned after their rotary positions, so that no weight can take it).
    It takes d products a feature, of which a head has d. Heads whose size is no power of two are turned in blocks of
    the largest one that divides it. Run it after `FuseAttention` and before `KVCache`.
    """

    needs = (is_forward,)
    keeps: ClassVar[Keeps] = REASSOCIATED

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        attentions = [eqn for eqn in graph.jaxpr.eqns if ir.is_op(eqn, "attention")]
        odd = [eqn for eqn in attentions if not any(_block(v.aval.shape[-1]) > 1 for v in eqn.invars[1:3])]
        misses = tuple(f"heads of an odd size stay as they are at {ir.source_line(eqn)}" for eqn in odd)
        hits = {"attention": len(attentions) - len(odd)}
        return graph.replace(jaxpr=_turned(graph.jaxpr)), Record("rotate_heads", hits=hits, misses=misses)


def _turned(jaxpr: ir.Jaxpr) -> ir.Jaxpr:
    turned: dict[ir.Atom, jax.Array] = {}  # what layers share stays shared, and is cached once

    def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
        if not ir.is_op(eqn, "attention"):
            return None
        for atom, value in zip(eqn.invars[:3], operands, strict=False):
            if atom not in turned:
                turned[atom] = turn(value)
        return [turn(out) for out in ir.bind(eqn, [*(turned[atom] for atom in eqn.invars[:3]), *operands[3:]])]

    return ir.retrace(jaxpr, rule)


def turn(x: jax.Array) -> jax.Array:
    """Returns x [..., d] times the orthogonal and symmetric Hadamard matrix of Sylvester, in blocks of `_block(d)`.

    It is its own inverse: entry i, j is (-1) to the number of bits that i and j share, over the root of the size.
    """
    size = _block(x.shape[-1])
    if size == 1:
        return x
    rows = jax.lax.iota(jnp.uint32, size)
    odd = jax.lax.population_count(rows[:, None] & rows[None, :]) % 2
    matrix = jnp.where(odd, -1.0, 1.0) / size**0.5
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    product = jnp.matmul(blocks, matrix.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return product.astype(x.dtype).reshape(x.shape)


def _block(size: int) -> int:
    """Returns the largest power of two that divides the size."""
    return size & -size
