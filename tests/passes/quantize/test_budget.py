"""A mix for a budget: what each scheme costs, which mix is chosen, and what is refused."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.graphs import graph_of, traced
from tests.passes.decoding import fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.passes import PASSES
from xlathe.passes.quantize import Budget, Quantize
from xlathe.passes.quantize.rtn import Rtn
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.quantize.sensitivity import Divergence, divergences, find_units, measure
from xlathe.pipeline import Context, Pipeline
from xlathe.report import count_parameters, weight_bytes
from xlathe.storage import parse_format

SCHEMES = ("int2:g32", "int4:g32", "int8:g32")
WIDTH, VOCAB = 64, 40


def deep(params: dict, ids: np.ndarray) -> np.ndarray:
    """A tied embedding around two products, of which `quiet` adds little to the residual stream."""
    x = params["embedding"][ids]
    x = x + x @ params["loud"]
    x = x + 0.01 * (x @ params["quiet"])
    return (x * params["scale"]) @ params["embedding"].T


@pytest.fixture(scope="module")
def graph() -> Graph:
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCAB, WIDTH), "loud": (WIDTH, WIDTH), "quiet": (WIDTH, WIDTH)}
    drawn = {name: rng.normal(size=shape).astype(np.float32) / WIDTH**0.5 for name, shape in shapes.items()}
    return graph_of(deep, scale=np.ones(WIDTH, np.float32), **drawn)


@pytest.fixture
def context() -> Context:
    return Context([np.random.default_rng(seed).integers(0, VOCAB, (2, 12)) for seed in range(2)])


def kl(graph: Graph, other: Graph, batches: list[np.ndarray]) -> float:
    """Nats a token, in float64."""
    found = []
    for tokens in batches:
        a, b = (np.asarray(each(tokens), np.float64) for each in (graph, other))
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
        found.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    return float(np.mean(found))


@pytest.mark.parametrize("shift", [1e-3, 1.0, 30.0, 90.0, 400.0])
def test_divergences_near_and_far(shift: float) -> None:
    """Expected: float64, also where the other model is sure of what the first one has as good as excluded."""
    base = np.zeros((3, 5), np.float32)
    base[1, 0], base[2, 2] = 20, 200
    other = base.copy()
    other[:, 3] += shift
    pair = base.astype(float), other.astype(float)
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in pair)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    found = divergences(jnp.asarray(base), jnp.asarray(other))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7 * shift)


def test_a_scheme_that_changes_nothing_is_not_what_others_are_measured_by(graph: Graph, context: Context) -> None:
    """Before: `quiet` lies on the grid of int4 already. Expected: int2 costs what it costs by itself."""
    stored = parse_format("int4:g32")
    on_grid = np.asarray(stored.dequantize(*stored.encode(np.asarray(graph.weights["quiet"]).T)).T)
    given = graph.with_weights({"quiet": jnp.asarray(on_grid)})
    (unit,) = [unit for unit in find_units(given) if unit.names == ("quiet",)]
    schemes = [Scheme.parse(text) for text in ("int4:g32", "int2:g32")]
    (costs,) = measure(given, [unit], [schemes], 4.5, Rtn(), context)
    assert costs[0] == 0
    rounded = Quantize(rules=(("quiet", "int2:g32"),))(given)
    assert costs[1] == pytest.approx(kl(given, rounded, context.calibration), rel=1e-3)


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0])
def test_divergence_is_that_of_the_definition(graph: Graph, context: Context, size: float) -> None:
    noise = np.random.default_rng(3).normal(size=(WIDTH, WIDTH)).astype(np.float32) * size
    changed = {"loud": np.asarray(graph.weights["loud"]) + noise}
    found = Divergence(graph, [graph.check_batch(batch) for batch in context.calibration])
    expected = kl(graph, graph.with_weights(changed), list(context.calibration))
    assert found(changed) == pytest.approx(expected, rel=2e-3)
    assert found({}) == 0


def test_what_a_weight_costs_is_measured_and_carried_over(graph: Graph, context: Context) -> None:
    """Expected: the scheme nearest to the budget costs what the model with this weight alone rounded does."""
    mix = Budget(bits=4.6, schemes=SCHEMES, method="rtn").choose(graph, context)
    alone = [kl(graph, Quantize(scheme, weights=name)(graph), list(context.calibration))
             for name, scheme in _schemes(mix, graph).items()]  # fmt: skip
    assert mix.loss == pytest.approx(sum(alone), rel=0.2)


def _schemes(mix, graph: Graph) -> dict[str, str]:
    return {name: str(scheme) for name, scheme in mix.quantize.plan(graph).schemes.items()}


@pytest.mark.parametrize("bits", [3.0, 4.0, 5.0, 6.5])
def test_no_other_mix_within_the_budget_is_closer(graph: Graph, context: Context, bits: float) -> None:
    names, batches = ("embedding", "loud", "quiet"), list(context.calibration)
    result = Budget(bits=bits, schemes=SCHEMES, method="rtn")(graph, context)
    assert weight_bytes(result) <= bits * count_parameters(graph) / 8
    others = []
    for schemes in itertools.product(SCHEMES, repeat=3):
        other = Quantize(rules=tuple(zip(names, schemes, strict=True)))(graph)
        if weight_bytes(other) <= bits * count_parameters(graph) / 8:
            others.append(kl(graph, other, batches))
    assert kl(graph, result, batches) <= 1.05 * min(others)  # costs add up to second order only


def test_quiet_weights_get_fewer_bits(graph: Graph, context: Context) -> None:
    schemes = _schemes(Budget(bits=5.5, schemes=SCHEMES, method="rtn").choose(graph, context), graph)
    assert schemes["quiet"] == "int2:g32" and "int2:g32" not in (schemes["loud"], schemes["embedding"])


def test_megabytes_and_bits_are_one_budget(graph: Graph, context: Context) -> None:
    megabytes = 5 * count_parameters(graph) / 8e6
    by_bits, by_size = (Budget(**{name: value}, schemes=SCHEMES).choose(graph, context)
                        for name, value in (("bits", 5.0), ("megabytes", megabytes)))  # fmt: skip
    assert by_bits == by_size
    assert by_bits.size == weight_bytes(by_bits.quantize(graph, context)) <= megabytes * 1e6


def test_the_mix_is_a_pass_of_its_own(graph: Graph, context: Context) -> None:
    """Expected: its text, read back, makes the same weights without measuring; it is told in the record."""
    budget = Budget(bits=5.0, schemes=SCHEMES, method="search")
    mix, result = budget.choose(graph, context), budget(graph, context)
    (again,) = Pipeline.parse(str(mix.quantize), PASSES).passes
    assert again == mix.quantize
    for name, array in again(graph, context).arrays.items():
        np.testing.assert_array_equal(array, result.arrays[name])
    plan = json.loads(mix.quantize.plan(graph).to_json())
    assert plan["bytes_after"] == mix.size == weight_bytes(result)
    record = result.history[-1]
    assert record.name == str(budget) and record.hits["weight"] == 3
    assert f"{mix.size:,} bytes" in record.notes[0] and "no mix has a smaller one" in record.notes[0]


def test_what_stays_counts(graph: Graph, context: Context) -> None:
    """An earlier pass chose one weight; the norm's scale is no matrix. `none` is worth its bytes where there are."""
    fixed = Quantize("int8:channel", weights="embedding")(graph)
    result = Budget(bits=6.0, schemes=SCHEMES)(fixed, context)
    assert "embedding.codes" in result.names("weight") and result.aval("embedding.codes").dtype == "int8"
    assert weight_bytes(result) <= 6 * count_parameters(graph) / 8
    wide = Budget(bits=32, schemes=("int4:g32", "none"))(graph, context)
    assert set(wide.names("weight")) == set(graph.names("weight"))


def test_experts_count_once_and_get_one_scheme() -> None:
    (variant,) = (v for v in DECODERS if v.name == "stacked_when_used")
    graph = fused(variant)
    units = find_units(graph)
    names = [name for unit in units for name in unit.names]
    assert len(names) == len(set(names)) and max(len(unit.names) for unit in units) == 4
    context = Context([np.random.default_rng(0).integers(0, variant.vocab, (2, 12))])
    result = Budget(bits=8.0, schemes=("int4:g8", "int8:channel"), method="rtn")(graph, context)
    assert weight_bytes(result) <= count_parameters(graph) and result.history[-1].hits["expert"] == 16


def test_is_the_same_each_time(graph: Graph, context: Context) -> None:
    first, second = (Budget(bits=4.6, schemes=SCHEMES, method="gptq").choose(graph, context) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "expected one positive number"),
        ({"bits": 4.0, "megabytes": 5.0}, "expected one positive number"),
        ({"bits": -1.0}, "expected one positive number"),
        ({"bits": 4.0, "schemes": ()}, "schemes: expected at least one"),
        ({"bits": 4.0, "schemes": ("int5",)}, "'int5' is not known"),
        ({"bits": 4.0, "schemes": ("int4:g32,a=int8",)}, "rounds activations too.*expected int4:g32$"),
        ({"bits": 4.0, "schemes": ("bf16",), "method": "gptq"}, "method=gptq of bf16: it chooses levels"),
        ({"bits": 4.0, "method": "gtpq"}, "unknown method 'gtpq'"),
    ],
)
def test_options_that_do_not_go_together(options: dict, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        Budget(**options)


def test_a_budget_that_is_too_small_says_what_is_possible(graph: Graph, context: Context) -> None:
    least = weight_bytes(Quantize("int2:g32")(graph))
    with pytest.raises(OptionError, match=rf"expected at least {least:,} bytes \(.* bits a weight\).*256 of them"):
        Budget(bits=2.0, schemes=SCHEMES)(graph, context)


def test_without_text_or_with_broken_weights_it_says_so(graph: Graph, context: Context) -> None:
    with pytest.raises(OptionError, match="calibration needs at least one batch"):
        Budget(bits=5.0, schemes=SCHEMES)(graph)
    broken = np.array(graph.weights["quiet"])
    broken[0, 0] = np.inf
    with pytest.raises(PassError, match="not finite"):
        Budget(bits=5.0, schemes=SCHEMES)(graph.with_weights({"quiet": broken}), context)


@pytest.mark.breadth
@pytest.mark.parametrize("name", ["llama", "gpt2", "nnx_scan"])
def test_authorings(name: str) -> None:
    (variant,) = (v for v in DECODERS if v.name == name)
    graph, tokens = fused(variant), np.random.default_rng(0).integers(0, variant.vocab, (2, 9))
    assert traced(name) is not None
    result = Budget(bits=9.0, schemes=("int4:channel", "int8:channel"), method="rtn")(graph, Context([tokens]))
    assert weight_bytes(result) <= 9 * count_parameters(graph) / 8
