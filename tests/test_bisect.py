"""The rewrite that breaks a model is found among many."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import graph_of
from xlathe import jaxpr as ir
from xlathe.bisect import bisect
from xlathe.errors import OptionError
from xlathe.graph import Graph, Record
from xlathe.pipeline import APPROXIMATE, Context, Pass

TOKENS = np.asarray([[1, 2, 3]])


@dataclasses.dataclass(frozen=True)
class DoubleSines(Pass):
    """Multiplies each sine by 1, and the one numbered `wrong` by 2: a pass with a fault in one of its rewrites."""

    keeps = APPROXIMATE
    wrong: int = -1

    def apply(self, graph: Graph, context: Context) -> tuple[Graph, Record]:
        sines = [eqn for eqn in graph.jaxpr.eqns if eqn.primitive.name == "sin"][: context.limit]
        factor = {id(eqn): 2.0 if i == self.wrong else 1.0 for i, eqn in enumerate(sines)}

        def rule(eqn, operands):
            return [ir.bind(eqn, operands)[0] * factor[id(eqn)]] if id(eqn) in factor else None

        record = Record("", rewrites=tuple(f"sine {i}" for i in range(len(sines))))
        return graph.replace(jaxpr=ir.retrace(graph.jaxpr, rule)), record


def chain() -> Graph:
    def model(params, tokens):
        x = params["e"][tokens]
        for _ in range(6):
            x = jnp.sin(x) + 0.5
        return x

    return graph_of(model, e=np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32))


@pytest.mark.parametrize("wrong", [0, 3, 5])
def test_finds_the_rewrite(wrong: int) -> None:
    graph = chain()
    expected = np.asarray(graph(TOKENS))
    pipeline = xl.Pipeline([DoubleSines(), DoubleSines(wrong), DoubleSines()])
    culprit = bisect(pipeline, graph, lambda g: not np.allclose(g(TOKENS), expected))
    assert culprit.number == 6 + wrong + 1
    assert str(culprit) == f"rewrite {culprit.number}, by double_sines{{wrong={wrong}}}: sine {wrong}"


def test_a_limit_stops_inside_a_pass_and_before_the_next() -> None:
    pipeline = xl.Pipeline([DoubleSines(), DoubleSines(0)])
    graph = pipeline(chain(), limit=4)
    assert [len(record.rewrites) for record in graph.history] == [4]
    assert [len(record.rewrites) for record in pipeline(chain(), limit=8).history] == [6, 2]
    assert not pipeline(chain(), limit=0).history


def test_nothing_to_find() -> None:
    with pytest.raises(OptionError, match="good after all 6 rewrites"):
        bisect(xl.Pipeline([DoubleSines()]), chain(), lambda graph: False)
    with pytest.raises(OptionError, match="bad before the first rewrite"):
        bisect(xl.Pipeline([DoubleSines()]), chain(), lambda graph: True)
