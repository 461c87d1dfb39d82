"""Structural checks and metrics, against the definitions written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import ZOO, graph_of, traced
from tests.passes.decoding import fused
from xlathe import jaxpr as ir
from xlathe.graph import Input, Weights
from xlathe.passes import KVCache
from xlathe.verify import check_equal, check_structure, compare, perplexity

RNG = np.random.default_rng(0)
E = RNG.normal(size=(11, 4)).astype(np.float32)
IDS = RNG.integers(0, 11, (3, 7), dtype=np.int32)


def graph(scale=1.0, e=E):
    return graph_of(lambda p, ids: (scale * p["e"])[ids] @ p["e"].T, e=e)


def probabilities(logits):
    x = np.exp(np.asarray(logits, np.float64))
    return x / x.sum(-1, keepdims=True)


def test_compare():
    a, b = graph(), graph(1.3, E + 0.1 * RNG.normal(size=E.shape).astype(np.float32))
    logits_a, logits_b = np.asarray(a(IDS), np.float64), np.asarray(b(IDS), np.float64)
    p, q = probabilities(logits_a), probabilities(logits_b)
    found = compare(a, b, IDS)
    kl = (p * np.log(p / q)).sum(-1).ravel()
    same = (p.argmax(-1) == q.argmax(-1)).ravel()
    assert np.isclose(found.max_relative, np.abs(logits_b - logits_a).max() / np.abs(logits_a).max(), rtol=1e-5)
    assert np.isclose(found.kl.mean, kl.mean(), rtol=1e-5)
    assert np.isclose(found.kl.error, kl.std(ddof=1) / np.sqrt(21), rtol=1e-5)
    assert found.same_top1.mean == same.mean()
    losses = -np.log(np.take_along_axis(q[:, :-1], IDS[:, 1:, None], -1)).ravel()
    assert np.isclose(found.perplexity_b.mean, np.exp(losses.mean()), rtol=1e-5)
    error = np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(18)
    assert np.isclose(found.perplexity_b.error, error, rtol=1e-5)
    assert found.perplexity_a == compare(a, a, IDS).perplexity_b == perplexity(a, IDS)


def test_a_graph_equals_itself():
    found = compare(graph(), graph(), IDS)
    assert found.max_relative == found.kl.mean == found.kl.error == 0 and found.same_top1.mean == 1


def test_blocks_do_not_change_the_metrics(monkeypatch):
    a, b = graph(), graph(1.3)
    whole = compare(a, b, IDS)
    monkeypatch.setattr("xlathe.verify._BLOCK", 22)  # two positions at a time
    assert compare(a, b, IDS) == whole


def test_impossible_tokens_count_nothing_in_kl():
    """Expected: 0 log 0 = 0, where a gives a token probability 0 in float64."""
    mask = np.where(np.arange(11) < 5, 0, -1e4).astype(np.float32)
    masked = graph_of(lambda p, ids: p["e"][ids] @ p["e"].T + p["mask"], e=E, mask=mask)
    assert compare(masked, masked, IDS).kl.mean == 0


def test_estimates_print_with_their_error():
    assert str(perplexity(graph(), IDS)).count("±") == 1


@pytest.mark.parametrize("ids", [[[1]], [1, 2], [[[1, 2]]]])
def test_too_few_tokens(ids):
    with pytest.raises(xl.OptionError, match="length of 2 or more"):
        perplexity(graph(), ids)


def test_other_vocabulary():
    with pytest.raises(xl.OptionError, match="11 and 10 tokens"):
        compare(graph(), graph(e=E[:10]), IDS % 10)


def test_check_equal():
    a, b = graph(), graph(1 + 1e-4)
    check_equal(a, graph(), IDS, 0.0)
    check_equal(a, b, IDS, 1e-3)
    with pytest.raises(xl.PassError, match=r"at most 1.0e-05, found 1.0e-04"):
        check_equal(a, b, IDS, 1e-5)
    with pytest.raises(xl.PassError, match="equal bits"):
        check_equal(a, b, IDS, 0.0)


def test_check_equal_refuses_nan():
    broken = graph_of(lambda p, ids: p["e"][ids] @ p["e"].T / p["zero"], e=E, zero=np.zeros(11, np.float32))
    with pytest.raises(xl.PassError):
        check_equal(graph(), broken, IDS, 1e-5)


def test_coarser_floats_get_a_few_units_of_their_last_place():
    def half(scale):
        return graph_of(lambda p, ids: (scale * p["e"]).astype(jnp.bfloat16)[ids] @ p["e"].T, e=E)

    check_equal(half(1.0), half(1.004), IDS, 1e-5)
    with pytest.raises(xl.PassError, match="found"):
        check_equal(half(1.0), half(1.1), IDS, 1e-5)


def test_well_formed_graphs_pass():
    forward = fused(ZOO["multi_query"])
    for each in (traced("multi_query"), forward, KVCache()(forward)):
        check_structure(each)


def with_output(change, **inputs):
    """A graph whose results are changed by `change`, unchecked."""
    base = graph()
    jaxpr = ir.trace(lambda *xs: change(ir.evaluate(base.jaxpr, xs)[0]), *(v.aval for v in base.jaxpr.invars))
    return base.replace(jaxpr=jaxpr)


def renamed(name):
    base = graph()
    return base.replace(inputs=(Input(name, "weight"), base.inputs[1]))


def argument_of(dtype):
    b, t = jax.export.symbolic_shape("b, t")
    avals = (jax.ShapeDtypeStruct((11, 4), jnp.float32), jax.ShapeDtypeStruct((b, t), dtype))
    jaxpr = ir.trace(lambda e, ids: e[ids.astype(jnp.int32)] @ e.T, *avals)
    return graph().replace(jaxpr=jaxpr)


MALFORMED = {
    "two inputs of a name": (lambda: renamed("tokens"), "two inputs are called 'tokens'"),
    "no array": (lambda: renamed("f"), "no array for the input 'f'"),
    "wrong shape": (lambda: graph().replace(weights=Weights({"e": E[:, :3]})), r"float32\[11, 3\].*float32\[11, 4\]"),
    "wrong dtype": (lambda: graph().replace(weights=Weights({"e": E.astype(np.float16)})), "float16"),
    "another argument": (
        lambda: graph().replace(inputs=(Input("e", "weight"), Input("ids", "arg"))),
        "has the argument tokens",
    ),
    "floats for tokens": (lambda: argument_of(jnp.float32), r"int32\[b, t\], they are float32\[b, t\]"),
    "no logits": (lambda: with_output(lambda x: x.sum(-1)), "returns logits"),
    "transposed logits": (lambda: with_output(lambda x: x.swapaxes(0, 1)), r"returns .*float32\[t, b, 11\]"),
    "two results": (lambda: with_output(lambda x: (x, x)), "returns logits"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_graph(name):
    make, reason = MALFORMED[name]
    with pytest.raises(xl.PassError, match=reason):
        check_structure(make())


def test_malformed_step():
    step = KVCache()(fused(ZOO["multi_query"]))
    missing = ir.trace(lambda *xs: ir.evaluate(step.jaxpr, xs)[:-1], *(v.aval for v in step.jaxpr.invars))
    with pytest.raises(xl.PassError, match="returns its new states"):
        check_structure(step.replace(jaxpr=missing))
    others = tuple(Input("ids", "arg") if i.name == "tokens" else i for i in step.inputs)
    with pytest.raises(xl.PassError, match="has the arguments"):
        check_structure(step.replace(inputs=others))
