"""The shrunk graph equals the whole graph with the pruned weights set to zero, in every decoder of the zoo.

Means in the whole graph count what is kept.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from tests.passes.decoding import difference, fused
from tests.passes.prune.masks import masked
from tests.variants import DECODERS, Variant
from tests.variants.base import decoder_params, mlp, rms_norm
from tests.variants.blocks import attention, causal
from xlathe.coupling import couple, separate
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Weights
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.prune import PrunePlan, PruneStructured, prune
from xlathe.passes.prune.cost import cost
from xlathe.passes.prune.groups import Groups
from xlathe.passes.prune.plan import Cost, Group
from xlathe.passes.prune.scores import Score
from xlathe.passes.quantize import Quantize
from xlathe.pipeline import Context
from xlathe.verify import compare

LACKS = {"heads": ("multi_query", "head_by_head", "no_attention"), "neurons": ("nnx_mask_buffer",)}


@pytest.mark.parametrize("variant", DECODERS, ids=str)
def test_equals_the_masked_graph(variant: Variant) -> None:
    graph = separate(fused(variant))
    wanted = {kind: 0.5 for kind, names in LACKS.items() if variant.name not in names}
    plan = PruneStructured(**wanted).make_plan(graph, Context())
    small = prune(graph, plan)
    assert {g.kind for g in plan.groups} == set(wanted)
    assert all(0 < len(g.kept) < g.size for g in plan.groups)
    tokens = np.random.default_rng(0).integers(0, variant.vocab, (2, 9))
    assert difference(small(tokens), masked(graph, plan)(tokens)) <= variant.rtol
    assert plan.after == cost(small, couple(small), {})
    assert plan.after.parameters == sum(np.size(small.weights[n]) for n in small.names("weight"))
    assert plan.before == cost(graph, couple(graph), {})


# one of each kind; every family is in test_families
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "repeat_gqa", "tied_head", "fused_qkv", "latent_attention", "one_expert"]
)
def test_a_narrower_stream_equals_the_masked_graph(name: str) -> None:
    graph = separate(fused(named(name)))
    found = Groups(graph)
    (atom,) = (atom for atom, kind in found.kinds.items() if kind == "hidden")
    size = int(found.dims.sizes[atom])
    kept = tuple(i for i in range(size) if i % 4)
    empty = Cost(0, 0, 0)
    group = Group("hidden", size, tuple(found.axes[atom]), kept, (0.0,) * size)
    plan = PrunePlan((group,), (), (), empty, empty)
    small = prune(graph, plan)
    tokens = np.random.default_rng(0).integers(0, named(name).vocab, (2, 9))
    assert difference(small(tokens), masked(graph, plan)(tokens)) <= named(name).rtol
    assert cost(graph, found.coupling, {atom: np.asarray(kept)}) == cost(small, couple(small), {})
    assert plan.width == kept


ROTATED = ("llama", "rope_half", "rope_interleaved", "rope_table_sliced")


@pytest.mark.parametrize("name", ROTATED)
def test_fewer_pairs_of_rotated_channels_equal_the_masked_graph(name: str) -> None:
    """Frequencies are constants, or made of numbers, which channels that are left keep."""
    graph = separate(fused(named(name)))
    found = Groups(graph)
    groups, empty = [], Cost(0, 0, 0)
    for atom in (atom for atom, kind in found.kinds.items() if kind == "query_key_dims"):
        size = int(found.dims.sizes[atom])
        groups.append(Group("query_key_dims", size, tuple(found.axes[atom]), tuple(range(1, size, 2)), (0.0,) * size))
    plan = PrunePlan(tuple(groups), (), (), empty, empty)
    small = prune(graph, plan)
    tokens = np.random.default_rng(0).integers(0, named(name).vocab, (2, 9))
    assert groups and difference(small(tokens), masked(graph, plan)(tokens)) <= named(name).rtol


UNKNOWN = [("rope_complex", "neither side is zero"), ("rope_table_gathered", "tile has no rule")]


@pytest.mark.parametrize(("name", "reason"), UNKNOWN)
def test_rotations_without_a_rule_are_named(name: str, reason: str) -> None:
    with pytest.raises(PassError, match=f"found no query_key_dims to prune; .*{reason}"):
        PruneStructured(query_key_dims=0.5)(fused(named(name)))


def test_scores_of_channels_of_queries_and_keys(two_heads: tuple[Graph, dict]) -> None:
    """Expected: the norm over heads of |q| |k|, each over all tokens, in NumPy; the better half of 8 channels stays."""
    graph, w = two_heads
    plan = PruneStructured(query_key_dims=0.5, score="activation").make_plan(graph, Context(batches(7)))
    x = w["embed"].astype(np.float64)[np.concatenate([b.reshape(-1) for b in batches(7)])]
    q, k = (np.linalg.norm((x @ w[name]).reshape(-1, 2, 8), axis=0) for name in ("wq", "wk"))
    (group,) = plan.groups
    np.testing.assert_allclose(group.scores, np.linalg.norm(q * k, axis=0), rtol=1e-5)
    assert group.kept == tuple(np.sort(np.argsort(group.scores)[-4:]))
    assert prune(graph, plan).aval("wq").shape == prune(graph, plan).aval("wk").shape == (6, 8)


def test_a_channel_that_is_zero_in_one_part_alone_stays() -> None:
    """Before: queries and keys are a projection h beside exp(h), which is one where h is zero."""

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        h = (x @ params["wq"]).reshape(*x.shape[:2], 2, 8)
        both = jnp.concatenate([h, jnp.exp(h)], axis=-1)
        values = (x @ params["wv"]).reshape(*x.shape[:2], 2, 8)
        return (x + attention(both, both, values).reshape(*x.shape[:2], 16) @ params["wo"]) @ params["head"]

    rng = np.random.default_rng(9)
    shapes = {"embed": (7, 6), "wq": (6, 16), "wv": (6, 16), "wo": (16, 6), "head": (6, 7)}
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    graph = FuseAttention()(Canonicalize()(xlathe.trace(model, params=w, max_len=16)))
    with pytest.raises(PassError, match=r"found no query_key_dims to prune; .*concatenate has it zero and not zero"):
        PruneStructured(query_key_dims=0.5)(graph)


@pytest.fixture
def two_heads() -> tuple[Graph, dict[str, np.ndarray]]:
    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        q, k, v = ((x @ params[name]).reshape(*x.shape[:2], 2, 8) for name in ("wq", "wk", "wv"))
        return (x + attention(q, k, v).reshape(*x.shape[:2], 16) @ params["wo"]) @ params["head"]

    rng = np.random.default_rng(8)
    shapes = {"embed": (7, 6), "wq": (6, 16), "wk": (6, 16), "wv": (6, 16), "wo": (16, 6), "head": (6, 7)}
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return FuseAttention()(Canonicalize()(xlathe.trace(model, params=w, max_len=16))), w


MEANS = {
    "mean": lambda x: (x**2).mean(-1, keepdims=True),
    "factor first": lambda x: (1 / 8) * jnp.sum(x**2, -1, keepdims=True),
    "einsum": lambda x: jnp.einsum("btd,btd->bt", x, x)[..., None] / 8,
    "product with ones": lambda x: ((x**2) @ jnp.ones((8, 1))) / 8,
}
NOT_FOUND = {
    "length": lambda x: jnp.sum(x**2, -1, keepdims=True),
    "sum and epsilon": lambda x: (jnp.sum(x**2, -1, keepdims=True) + 1e-6) / 8,
}


def normed(mean: Callable[[jnp.ndarray], jnp.ndarray]) -> tuple[Graph, dict[str, np.ndarray]]:
    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        x = x + jnp.tanh(x @ params["up"]) @ params["down"]
        return x / jnp.sqrt(mean(x)) @ params["head"]

    rng = np.random.default_rng(2)
    shapes = {"embed": (7, 8), "up": (8, 6), "down": (6, 8), "head": (8, 7)}
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Canonicalize()(xlathe.trace(model, params=w, max_len=16)), w


@pytest.mark.parametrize("name", MEANS)
def test_a_norm_counts_what_is_kept(name: str) -> None:
    """Before: an RMS norm over 8 features. Expected: NumPy's over the 4 that stay, its mean over 4."""
    (graph, w), seen = normed(MEANS[name]), batches(7)
    plan = PruneStructured(hidden=0.5, score="activation").make_plan(graph, Context(seen))
    kept, small = list(plan.width or ()), prune(graph, plan)
    x = w["embed"][seen[0]][..., kept]
    x = x + np.tanh(x @ w["up"][kept]) @ w["down"][:, kept]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) @ w["head"][kept]
    assert len(kept) == 4 and difference(small(seen[0]), expected) <= 1e-5


@pytest.mark.parametrize("name", NOT_FOUND)
def test_a_norm_that_may_count_features_blocks_them(name: str) -> None:
    with pytest.raises(PassError, match=r"found no hidden .*reduce_sum sums over it at .*, and is not divided by its"):
        PruneStructured(hidden=0.5, score="activation").make_plan(normed(NOT_FOUND[name])[0], Context(batches(7)))


def test_scores_do_not_depend_on_the_order_of_axes() -> None:
    """Before: weights read x [b, t, d], or its transpose [d, b, t]. Expected: the same scores of features."""

    def model(turned: bool) -> Graph:
        def run(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
            x = params["embed"][tokens]
            read = jnp.einsum("dbt,dn->btn", x.transpose(2, 0, 1), params["up"]) if turned else x @ params["up"]
            x = x + jnp.tanh(read) @ params["down"]
            return jnp.einsum("dbt,dv->btv", x.transpose(2, 0, 1), params["head"]) if turned else x @ params["head"]

        shapes = {"embed": (7, 8), "up": (8, 6), "down": (6, 8), "head": (8, 7)}
        rng = np.random.default_rng(5)
        w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        return xlathe.trace(run, params=w, max_len=16)

    planned = PruneStructured(hidden=0.5, score="activation")
    plain, other = (planned.make_plan(model(turned), Context(batches(7))).groups[0].scores for turned in (False, True))
    np.testing.assert_allclose(other, plain, rtol=1e-5)


def test_groups_that_share_an_axis_keep_their_own_scores() -> None:
    """Before: one product for 4 and 6 neurons of a layer. Expected: each keeps its largest, to a budget too."""

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        a, b = jnp.split(x @ params["in"], [4], axis=-1)
        return (x + jnp.tanh(a) @ params["a_out"] + jnp.sin(b) @ params["b_out"]) @ params["embed"].T

    shapes = {"embed": (7, 6), "in": (6, 10), "a_out": (4, 6), "b_out": (6, 6)}
    rng = np.random.default_rng(6)
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    graph = Canonicalize()(xlathe.trace(model, params=w, max_len=16))
    plan = PruneStructured(params=0.8, score="weight").make_plan(graph, Context(batches(7)))
    assert {group.size for group in plan.groups} == {4, 6}
    for group in plan.groups:
        best = np.sort(np.argsort(group.scores)[-len(group.kept) :])
        assert len(group.scores) == group.size and group.kept == tuple(best)
    assert np.isfinite(prune(graph, plan)(batches(7)[0])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0.1}, "nothing to remove: heads=0.1 takes none: groups of 2"),
        ({"neurons": 0.01}, "nothing to remove: neurons=0.01 takes none: groups of 64, kept in multiples of 32"),
    ],
)
def test_a_fraction_that_takes_nothing(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneStructured(**options)(fused(named("llama")))


def test_taylor_scores_need_a_next_token() -> None:
    with pytest.raises(OptionError, match="rows of two calibration tokens or more"):
        PruneStructured(neurons=0.5, score="taylor")(fused(named("llama")), Context([np.ones((2, 1), np.int32)]))


def test_taylor_scores_are_slopes_times_weights() -> None:
    """The score of a neuron is |d loss / d factor| of a factor 1 on its output, by finite differences in float64."""
    rng = np.random.default_rng(3)
    shapes = {"embed": (7, 6), "up": (6, 4), "down": (4, 6)}
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        return (x + (x @ params["up"]) @ params["down"]) @ params["embed"].T

    def loss(factor: np.ndarray) -> float:
        e, up, down = (w[name].astype(np.float64) for name in shapes)
        x = e[tokens]
        logits = ((x + (x @ up * factor) @ down) @ e.T)[:, :-1]
        chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())

    tokens = batches(7)[0]
    graph = Canonicalize()(xlathe.trace(model, params=w, max_len=16))
    plan = PruneStructured(neurons=0.5, score="taylor").make_plan(graph, Context([tokens]))
    slopes = [(loss(1 + 1e-5 * unit) - loss(1 - 1e-5 * unit)) / 2e-5 for unit in np.eye(4)]
    (group,) = plan.groups  # both weights of a neuron scale its output
    np.testing.assert_allclose(group.scores, 2 * np.abs(slopes), rtol=1e-3)


def test_a_budget_is_met_and_the_best_candidate_wins() -> None:
    graph = fused(named("llama"))
    plan = PruneStructured(params=0.7, score="activation").make_plan(graph, Context(batches(61)))
    small = prune(graph, plan)
    assert sum(np.size(small.weights[n]) for n in small.names("weight")) == plan.after.parameters
    assert plan.after.parameters <= 0.7 * plan.before.parameters
    assert [kl for _, kl in plan.tried] == sorted(kl for _, kl in plan.tried) and len(plan.tried) > 1
    assert len({what for what, _ in plan.tried}) == len(plan.tried)
    assert abs(compare(graph, small, batches(61)[-1][-1:]).kl.mean - plan.tried[0][1]) < 1e-6


def test_a_budget_by_the_size_of_weights_leaves_the_stream_alone_and_says_so() -> None:
    plan = PruneStructured(params=0.7, score="weight_l1").make_plan(fused(named("llama")), Context(batches(61)))
    assert plan.width is None and all("features" not in what for what, _ in plan.tried)
    assert "features of the stream are left alone: by the size of weights (score=weight_l1)" in str(plan)


def test_a_budget_in_megabytes_is_met_without_a_layer() -> None:
    """Before: two layers. Expected: 0.42 of the bytes, which one layer with fewer neurons has; scores go along."""
    graph = fused(named("llama"))
    whole = sum(np.asarray(graph.weights[name]).nbytes for name in graph.names("weight"))
    plan = PruneStructured(megabytes=0.42 * whole / 1e6, score="weight").make_plan(graph, Context(batches(61)))
    small = prune(graph, plan)
    assert len(plan.layers) == 1 and plan.groups
    assert sum(np.asarray(small.weights[name]).nbytes for name in small.names("weight")) == plan.after.bytes
    assert plan.after.bytes <= 0.42 * whole
    for group in plan.groups:
        assert group.kept == tuple(np.sort(np.argsort(-np.array(group.scores), kind="stable")[: len(group.kept)]))


@pytest.mark.parametrize("options", [{"params": 0.01}, {"megabytes": 0.001}])
def test_a_budget_that_cannot_be_met(options: dict) -> None:
    with pytest.raises(OptionError, match=r"(params|megabytes)=[\d.]+ cannot be met: the smallest possible is [\d,.]+"):
        PruneStructured(**options, score="activation")(fused(named("llama")), Context(batches(61)))


def test_a_budget_that_is_met_already() -> None:
    with pytest.raises(OptionError, match=r"megabytes=5: the model has 0\.0\d+ already"):
        PruneStructured(megabytes=5)(fused(named("llama")), Context(batches(61)))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in LACKS.items() for name in names])
def test_what_is_not_there_is_an_error_that_says_what_blocks(kind: str, name: str) -> None:
    with pytest.raises(PassError, match=f"found no {kind} to prune; .* axis 0: gather looks it up by index at "):
        PruneStructured(**{kind: 0.5})(fused(named(name)))


def named(name: str) -> Variant:
    return next(v for v in DECODERS if v.name == name)


def batches(vocab: int) -> list[np.ndarray]:
    return list(np.random.default_rng(4).integers(0, vocab, (3, 2, 12)))


def test_before_and_after() -> None:
    """Before: x @ up, gelu, @ down with 4 neurons. Expected: the two with the largest weights stay."""

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        return (x + jnp.tanh(x @ params["up"]) @ params["down"]) @ params["embed"].T

    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(7, 6)), "up": rng.normal(size=(6, 4)), "down": rng.normal(size=(4, 6))}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    params["up"] *= [1, 9, 1, 9]
    graph = Canonicalize()(xlathe.trace(model, params=params, max_len=8))
    small = PruneStructured(neurons=0.5)(graph)
    assert small.aval("up").shape == (6, 2) and small.aval("down").shape == (2, 6)
    np.testing.assert_array_equal(small.weights["up"], params["up"][:, [1, 3]])
    np.testing.assert_array_equal(small.weights["down"], params["down"][[1, 3]])
    assert small.history[-1].hits == {"heads": 0, "neurons": 2, "hidden": 0, "experts": 0, "value_dims": 0,
                                       "query_key_dims": 0, "layers": 0}  # fmt: skip


@pytest.mark.parametrize(("score", "order"), [("weight", 2), ("weight_l1", 1)])
def test_weight_scores_are_norms(score: Score, order: int) -> None:
    """The score of a neuron is a norm of its column of `up` and its row of `down`, in NumPy."""
    graph = fused(named("llama"))
    plan = PruneStructured(neurons=0.5, score=score).make_plan(separate(graph), Context())
    group = plan.groups[0]
    both = [np.moveaxis(np.asarray(graph.weights[name], np.float64), axis, 0) for name, axis in group.axes]
    expected = np.linalg.norm(np.concatenate(both, axis=1), ord=order, axis=1)
    np.testing.assert_allclose(group.scores, expected, rtol=1e-6)


def test_activation_scores_are_norms_of_what_is_fed_on() -> None:
    """The score of a neuron is the L2 norm of its output over all calibration tokens, in NumPy."""
    rng = np.random.default_rng(1)
    embed, up = rng.normal(size=(7, 6)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    down = rng.normal(size=(4, 6)).astype(np.float32)

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        return (x + jnp.tanh(x @ params["up"]) @ params["down"]) @ params["embed"].T

    graph = xlathe.trace(model, params={"embed": embed, "up": up, "down": down}, max_len=16)
    seen = batches(7)
    plan = PruneStructured(neurons=0.5, score="activation").make_plan(separate(graph), Context(seen))
    fed = np.tanh(embed[np.concatenate([b.reshape(-1) for b in seen])].astype(np.float64) @ up)
    np.testing.assert_allclose(plan.groups[0].scores, np.sqrt((fed**2).sum(0)), rtol=1e-5)


def test_grouped_heads_go_with_the_queries_that_share_them() -> None:
    small = PruneStructured(heads=0.5)(fused(named("repeat_gqa")))
    shapes = [small.aval(f"layers/0/{name}").shape for name in ("wq", "wk", "wv", "wo")]
    assert shapes == [(32, 16), (32, 8), (32, 8), (16, 32)]  # 1 key-value head of 8 and its 2 query heads


def test_layers_that_change_little_are_removed() -> None:
    """A layer whose branches are zero passes its input on: removing it changes nothing, and it is the first to go."""
    graph = fused(named("llama"))
    arrays = dict(graph.arrays)
    for name in graph.names("weight"):
        if re.search(r"layers/1/.*(o_proj|down)/kernel", name):
            arrays[name] = jnp.zeros_like(arrays[name])
    graph = graph.replace(weights=Weights(arrays))
    small = PruneStructured(layers=1)(graph, Context(batches(61)))
    assert not any(name.startswith("layers/1/") for name in small.names("weight"))
    tokens = batches(61)[0]
    assert difference(small(tokens), graph(tokens)) <= 1e-6


def test_a_plan_prints_is_saved_and_replays(tmp_path) -> None:
    graph = fused(named("llama"))
    pass_ = PruneStructured(heads=0.5, neurons=0.25, layers=1)
    plan = pass_.make_plan(separate(graph), Context(batches(61)))
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    assert re.search(r"heads +1 of 2 .*o_proj", str(plan)) and "parameters: " in str(plan)
    replayed = PruneStructured(plan=str(tmp_path / "plan.json"))(graph)
    assert difference(replayed(batches(61)[0]), pass_(graph, Context(batches(61)))(batches(61)[0])) == 0
    with pytest.raises(OptionError, match=r"the plan is of another model: it has 2 heads in .*, this graph has no"):
        PruneStructured(plan=str(tmp_path / "plan.json"))(fused(named("gpt_neox")))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(OptionError, match="is no pruning plan: ValueError: expected an object whose format is"):
        PrunePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 1.0}, "heads is the fraction to remove, 0 to below 1, got 1.0"),
        ({"neurons": -0.1}, "neurons is the fraction"),
        ({"layers": -1}, "layers is how many to remove, got -1"),
        ({"neurons": 0.5, "score": "random"}, "score is one of 'weight', 'weight_l1', .*, got 'random'"),
        ({"hidden": 0.5, "score": "weight_l1"}, "the residual stream cut by the size of weights"),
        ({"params": 1.0}, "params is the fraction to keep, above 0, below 1, got 1.0"),
        ({"megabytes": -1}, "megabytes is how many to keep, a number above 0, got -1"),
        ({"latency": 0}, "latency is how many milliseconds of a token to keep, a number above 0, got 0"),
        ({"latency": True}, "latency is how many milliseconds of a token to keep, a number above 0, got True"),
        ({"params": 0.5, "megabytes": 3}, "params and megabytes are budgets; give one of them"),
        ({"params": 0.5, "heads": 0.5}, "a budget finds the shape"),
        ({"neurons": 0.5, "plan": "x.json"}, "a plan is replayed as it is"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneStructured(**options)


@pytest.mark.parametrize("options", [{"layers": 1}, {"neurons": 0.5, "score": "activation"}])
def test_missing_calibration(options: dict) -> None:
    with pytest.raises(OptionError, match=r"calibration tokens: pipeline\(graph, calibration=batches\)"):
        PruneStructured(**options)(fused(named("llama")))


def test_nothing_to_remove() -> None:
    options = "heads, neurons, hidden, experts, value_dims, query_key_dims, layers, params, megabytes, latency"
    with pytest.raises(OptionError, match=f"nothing to remove; give {options} or a plan"):
        PruneStructured()(fused(named("llama")))


def test_too_many_layers() -> None:
    with pytest.raises(OptionError, match="layers=2 of 2 layers cannot go: at least one must stay"):
        PruneStructured(layers=2)(fused(named("llama")), Context(batches(61)))


def test_quantized_weights_are_not_pruned() -> None:
    with pytest.raises(PassError, match=r"found no neurons to prune; .*xlathe\.quantized_dot has no rule"):
        PruneStructured(neurons=0.5)(Quantize()(fused(named("llama"))))
    with pytest.raises(OptionError, match=r"params=0\.5 cannot be met: the smallest possible is"):
        PruneStructured(params=0.5)(Quantize()(fused(named("llama"))), Context(batches(61)))


def test_a_mean_over_neurons_is_not_zero_where_they_go() -> None:
    """A norm that subtracts the mean over neurons would see that some are gone: it blocks them."""

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        hidden = x @ params["up"]
        centered = hidden - hidden.mean(-1, keepdims=True)
        normed = centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
        return (x + normed @ params["down"]) @ params["embed"].T

    rng = np.random.default_rng(0)
    shapes = {"embed": (7, 6), "up": (6, 8), "down": (8, 6)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    with pytest.raises(PassError, match=r"found no neurons to prune; .* reduce_sum would count what is removed"):
        PruneStructured(neurons=0.5)(Canonicalize()(xlathe.trace(model, params=params, max_len=8)))


@pytest.mark.parametrize(
    ("kept", "found"),
    [([3, 1], "3, 1"), ([1, 1], "1, 1"), ([], ""), ([0, 64], "0, 64"), ([-1], "-1"), (["0"], "expected a list of int")],
)
def test_a_plan_keeps_known_indices_once_and_in_order(kept: list, found: str, tmp_path) -> None:
    path = tmp_path / "plan.json"
    PruneStructured(neurons=0.5).make_plan(separate(fused(named("llama"))), Context()).save(path)
    content = json.loads(path.read_text())
    content["groups"][0]["kept"] = kept
    path.write_text(json.dumps(content))
    with pytest.raises(OptionError, match=rf"is no pruning plan: ValueError: .*{found}"):
        PrunePlan.load(path)


def test_weights_that_are_not_finite_are_no_order() -> None:
    graph = fused(next(variant for variant in DECODERS if variant.name == "llama"))
    broken = np.array(graph.arrays["layers/0/down/kernel"])
    broken[0, 0] = np.nan
    with pytest.raises(PassError, match="scores of neurons are not finite"):
        PruneStructured(neurons=0.5)(graph.with_weights({"layers/0/down/kernel": broken}))


def test_a_budget_where_a_layer_that_goes_blocked_the_stream() -> None:
    """Before: three layers, the least important of which sums over features. Expected: they are left alone, it goes."""

    def model(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for i, layer in enumerate(params["layers"]):
            x = x + causal(layer, rms_norm(x, layer["norm1"]))
            h = rms_norm(x, layer["norm2"])
            x = x + mlp(layer, h / (1 + jnp.abs(h).sum(-1, keepdims=True)) if i == 1 else h)
        return rms_norm(x, params["norm"]) @ params["unembed"]

    params = decoder_params(0)
    quiet = jax.tree.map(lambda a: a * 0.001 if a.ndim == 2 else a, params["layers"][1])
    params["layers"] = [params["layers"][0], quiet, decoder_params(1)["layers"][0]]
    graph = FuseAttention()(Canonicalize()(xlathe.trace(model, params=params, max_len=16)))
    rows = list(np.random.default_rng(0).integers(0, 17, (4, 2, 12)))
    plan = PruneStructured(params=0.4, score="activation").make_plan(graph, Context(rows))
    assert 1 in plan.layers and plan.width is None and plan.after.parameters <= 0.4 * plan.before.parameters


def one_layer(change: Callable[[jax.Array], jax.Array]) -> Graph:
    """A layer of 16 neurons, which a function changes."""
    rng = np.random.default_rng(0)
    shapes = {"table": (24, 32), "up": (32, 16), "down": (16, 32), "head": (32, 24)}

    def model(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        x = params["table"][tokens]
        return (x + change(x @ params["up"]) @ params["down"]) @ params["head"]

    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return separate(Canonicalize()(xlathe.trace(model, params=params, max_len=16)))


def test_an_empty_slice_is_no_group() -> None:
    """As `x[..., d:]` is, where all of a head is rotated."""
    graph = one_layer(lambda h: jax.nn.relu(jnp.concatenate([h[..., :16], h[..., 16:]], -1)))
    assert PruneStructured(neurons=0.5, score="weight")(graph).aval("up").shape == (32, 8)


@pytest.mark.parametrize("differ", ["subtract", "maximum", "minimum"])
def test_what_one_axis_makes_zero_is_not_zero_along_another(differ: str) -> None:
    """Before: a sum over neurons j of f(h_i, h_j), neither of which is zero where the other is. Expected: blocked."""
    found = Groups(one_layer(lambda h: h * getattr(jnp, differ)(h[..., :, None], h[..., None, :]).sum(-1)))
    assert "neurons" not in found.kinds.values()
    assert re.search("(sub|max|min) has it on two axes at .*test_structured.py", "; ".join(found.reasons()))


def test_a_product_of_two_axes_is_zero_along_both() -> None:
    graph = one_layer(lambda h: (h[..., :, None] * h[..., None, :] * 0.01).sum(-1))
    plan = PruneStructured(neurons=0.5, score="weight").make_plan(graph, Context())
    tokens = np.random.default_rng(1).integers(0, 24, (2, 12), dtype=np.int32)
    assert difference(prune(graph, plan)(tokens), masked(graph, plan)(tokens)) < 1e-5
