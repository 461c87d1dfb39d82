"""Laws of pruning for every family of pretrained models, one tiny configuration each."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xlathe as xl
from tests.models.parity import cases
from tests.models.tiny import tiny_checkpoint
from tests.passes.decoding import difference, fused
from tests.passes.prune.masks import masked
from tests.variants.experts import DECODERS as ROUTED
from tests.variants.experts import one_expert, repeated_rows, stacked_when_used
from xlathe import jaxpr as ir
from xlathe import passes
from xlathe.coupling import couple, separate
from xlathe.graph import Graph
from xlathe.models.moe import Choice, SoftmaxRouter, SparseFeedForward
from xlathe.models.pretrained import to_graph
from xlathe.models.resize import head_channels
from xlathe.models.settings import Settings
from xlathe.passes.prune import PrunePlan, prune
from xlathe.passes.prune.cost import cost
from xlathe.passes.prune.groups import Groups
from xlathe.passes.prune.plan import Group, Kind
from xlathe.pipeline import Context
from xlathe.shrink import shrink

FAMILIES = (cases.LLAMA, cases.MISTRAL, cases.QWEN2, cases.QWEN3, cases.GEMMA2, cases.GEMMA3, cases.PHI3, cases.GPT2,
            cases.GPT_NEOX, cases.MIXTRAL, cases.QWEN3_MOE, cases.DEEPSEEK_V3)  # fmt: skip
WITH_EXPERTS = ("mixtral", "qwen3_moe")
WITH_VALUES = (cases.LLAMA, cases.GPT_NEOX)
# the other families make queries and keys as one of these does, but for Phi-3
NARROWED = (cases.LLAMA, cases.QWEN3, cases.GEMMA3, cases.GPT2, cases.GPT_NEOX, cases.DEEPSEEK_V3)
DIFFERENT = (cases.PHI3, cases.GPT_NEOX, cases.MIXTRAL, cases.DEEPSEEK_V3)
SQUARE = ("gpt2", "gpt_neox")  # whose heads fill the stream
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9), dtype=np.int32)
KEPT = {"heads": 0.75, "neurons": 0.5, "hidden": 0.75, "experts": 0.75, "value_dims": 0.5, "query_key_dims": 0.5}
QUERY_KEY = {"gpt2": {8}, "gpt_neox": {6}, "deepseek_v3": {4, 12}}  # nothing or a part of a head is rotated


def config_of(family: cases.Family, **changes: Any) -> dict[str, Any]:
    short = {"n_layer" if family.model_type == "gpt2" else "num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = family.config(family.cases[0]) | {k: v for k, v in short.items() if k in family.common}
    return config | changes


def graph_of(config: dict[str, Any]) -> Graph:
    graph = to_graph(tiny_checkpoint(config), max_len=16)
    return separate(xl.Pipeline([passes.Canonicalize(), passes.FuseAttention()])(graph))


@functools.cache
def cached(number: int) -> Graph:
    return graph_of(config_of(FAMILIES[number]))


def family_graph(family: cases.Family) -> Graph:
    return cached(FAMILIES.index(family))  # families hold dictionaries, which have no hash


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.model_type)
def graph(request: pytest.FixtureRequest) -> Graph:
    return family_graph(request.param)


def logits_of(graph: Graph) -> np.ndarray:
    """As `graph(TOKENS)`; compiles in half the time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(graph.logits, compiler_options=options)
    return np.asarray(run(graph.arrays, {"tokens": TOKENS}))


def plan_of(graph: Graph, *kinds: Kind) -> PrunePlan:
    """A plan that keeps indices drawn at random of every group of these kinds."""
    found, groups, kept = Groups(graph), [], {}
    for atom, kind in found.kinds.items():
        size = int(found.dims.sizes[atom])
        if kind in kinds and size > 1:
            drawn = np.random.default_rng(atom).permutation(size)
            kept[atom] = np.sort(drawn[: int(size * KEPT[kind])])
            axes = tuple(found.axes[atom])
            start = found.start(atom, axes[0])
            groups.append(Group(kind, size, axes, tuple(kept[atom].tolist()), (0.0,) * size, start))
    before, after = cost(graph, found.coupling, {}), cost(graph, found.coupling, kept)
    return PrunePlan(tuple(groups), (), (), before, after)


def test_equals_the_masked_graph_and_so_does_what_is_saved(graph: Graph, tmp_path: Path) -> None:
    """Experts that go are those that a router never chooses."""
    plan = plan_of(graph, "heads", "neurons", "hidden", "experts")
    experts = {"experts"} if graph.card.config["model_type"] in WITH_EXPERTS else set()
    assert {group.kind for group in plan.groups} == {"heads", "neurons", "hidden"} | experts
    small = prune(graph, plan)
    logits = logits_of(small)
    assert difference(logits, logits_of(unchosen(masked(graph, plan), plan))) <= 1e-5
    assert cost(small, couple(small), {}) == plan.after
    assert plan.after.parameters == sum(np.size(small.weights[name]) for name in small.names("weight"))
    small.save_pretrained(tmp_path)
    assert difference(logits_of(xl.from_pretrained(tmp_path, max_len=16)), logits) <= 1e-5


def unchosen(graph: Graph, plan: PrunePlan) -> Graph:
    """Gives experts that a plan removes no chance: their logits are -inf."""
    gone = {g.axes[0][0]: np.setdiff1d(np.arange(g.size), g.kept) for g in plan.groups if g.kind == "experts"}
    names = {var: item.name for var, item in zip(graph.jaxpr.invars, graph.inputs, strict=True)}

    def rule(eqn: ir.JaxprEqn, operands: list) -> list | None:
        router = next((names[a] for a in eqn.invars if isinstance(a, ir.Var) and names.get(a) in gone), None)
        if router is None:
            return None
        (logits,) = ir.bind(eqn, operands)
        for expert in gone[router].tolist():
            logits = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, logits)
        return [logits]

    return graph.replace(jaxpr=ir.retrace(graph.jaxpr, rule))


@pytest.mark.parametrize("author", [repeated_rows, stacked_when_used, one_expert])
def test_experts_of_other_authors_go_or_are_named(author: Callable) -> None:
    graph = separate(fused(next(variant for variant in ROUTED if variant.name == author.__name__)))
    if author is one_expert:
        with pytest.raises(xl.PassError, match=r"found no experts to prune; .*argmax has no rule for shrinking it"):
            passes.PruneStructured(experts=0.5)(graph)
        return
    plan = plan_of(graph, "experts")
    assert {(len(group.kept), group.size) for group in plan.groups} == {(3, 4)}
    tokens = TOKENS % graph.vocab
    assert difference(prune(graph, plan)(tokens), unchosen(graph, plan)(tokens)) <= 1e-5


def test_experts_that_are_chosen_by_groups_stay() -> None:
    graph = family_graph(cases.DEEPSEEK_V3)
    with pytest.raises(xl.PassError, match="found no experts to prune; "):
        passes.PruneStructured(experts=0.5)(graph)


@pytest.mark.parametrize("graph", WITH_VALUES, ids=lambda family: family.model_type, indirect=True)
def test_narrower_values_equal_the_masked_graph(graph: Graph) -> None:
    plan = plan_of(graph, "value_dims")
    assert len(plan.groups) == 1
    small = prune(graph, plan)
    assert difference(logits_of(small), logits_of(masked(graph, plan))) <= 1e-5
    assert cost(small, couple(small), {}) == plan.after


@pytest.mark.parametrize("graph", NARROWED, ids=lambda family: family.model_type, indirect=True)
def test_narrower_queries_and_keys_equal_the_masked_graph(graph: Graph) -> None:
    """Channels, or pairs that are rotated. Norms of the masked graph count what is kept, products are scaled as before.

    Expected: where heads are rotated as a whole, half as many pairs as a head has channels.
    """
    plan, kind = plan_of(graph, "query_key_dims"), graph.card.config["model_type"]
    settings = Settings(graph.card.config, kind)
    assert {group.size for group in plan.groups} == QUERY_KEY.get(kind, {head_channels(settings)[0] // 2})
    small = prune(graph, plan)
    assert difference(logits_of(small), logits_of(masked(graph, plan))) <= 1e-5
    assert cost(small, couple(small), {}) == plan.after
    assert plan.after.parameters == sum(np.size(small.weights[name]) for name in small.names("weight"))


@pytest.mark.parametrize("kinds", [("query_key_dims",), ("value_dims", "query_key_dims")], ids="+".join)
def test_narrower_heads_have_no_configuration(kinds: tuple[Kind, ...], tmp_path: Path) -> None:
    """Half the channels of all heads are the sizes of half as many heads, which would be another model."""
    small = prune(family_graph(cases.LLAMA), plan_of(family_graph(cases.LLAMA), *kinds))
    with pytest.raises(xl.CheckpointError, match=r"heads have \d channels of keys .*; Graph\.save keeps it"):
        small.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_narrower_heads_decode_as_they_read() -> None:
    """The derived step rotates the pairs that are left by their own frequencies."""
    graph = family_graph(cases.QWEN3)
    small = prune(graph, plan_of(graph, "query_key_dims", "value_dims"))
    program = xl.compile(small, max_len=16, unit=4, chunks=(4,))
    tokens = [int(t) for t in TOKENS[0]]
    for token in program.generate([tokens], max_tokens=4)[0].tokens:
        assert token == int(np.argmax(np.asarray(small(np.array([tokens])))[0, -1]))
        tokens.append(token)


def test_channels_that_values_share_with_keys_stay() -> None:
    """Phi-3 makes queries, keys and values in one product of heads, whose channels are one axis."""
    for kind in ("value_dims", "query_key_dims"):
        with pytest.raises(xl.PassError, match=rf"found no {kind} to prune; .*channel of values and of keys at once"):
            passes.PruneStructured(**{kind: 0.5})(family_graph(cases.PHI3))


class Mixed(nnx.Module):
    """Experts on embeddings, and nothing else."""

    def __init__(self, router: type[SoftmaxRouter] = SoftmaxRouter) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(64, 16, rngs=rngs)
        chooser = router(16, Choice(experts=6, chosen=2), rngs=rngs)
        self.experts = SparseFeedForward(16, 12, chooser, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.embed.attend(x + self.experts(x))


class Shared(SoftmaxRouter):
    """Weighs experts by their part of the sum of all logits' sizes, which an expert that is gone is no part of."""

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = self.gate(x)
        return jax.lax.top_k(logits / jnp.abs(logits).sum(-1, keepdims=True), self.choice.chosen)


def test_a_router_that_sums_over_all_experts_keeps_them() -> None:
    graph = passes.Canonicalize()(xl.trace(Mixed(Shared), max_len=16))
    with pytest.raises(xl.PassError, match=r"found no experts to prune; .*router/gate/kernel axis 1: reduce_sum sums"):
        passes.PruneStructured(experts=0.5)(graph)


def test_scores_of_experts_are_norms_of_what_they_give() -> None:
    """Expected: of the tokens that chose it, the norm of probability times output, in NumPy; as many as chosen stay."""
    model = Mixed()
    x = np.asarray(model.embed.embedding[...], np.float64)[TOKENS.reshape(-1)]
    logits = x @ np.asarray(model.experts.router.gate.kernel[...])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = np.zeros(6)
    for i, expert in enumerate(model.experts.experts):
        gate, up, down = (np.asarray(part.kernel[...]) for part in (expert.gate, expert.up, expert.down))
        given = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
        chosen = (shares > shares[:, [i]]).sum(1) < 2
        scores[i] = np.linalg.norm((shares[:, [i]] * given)[chosen])
    plan = passes.PruneStructured(experts=0.9, score="activation").make_plan(
        passes.Canonicalize()(xl.trace(model, max_len=16)), Context([TOKENS])
    )
    (group,) = plan.groups
    np.testing.assert_allclose(group.scores, scores, rtol=1e-4)
    assert group.kept == tuple(np.sort(np.argsort(scores)[-2:])) and plan.removed == "4 of 6 experts"


@pytest.mark.parametrize("graph", DIFFERENT, ids=lambda family: family.model_type, indirect=True)
def test_sorting_changes_nothing(graph: Graph) -> None:
    """Before: groups as they were trained. Expected: any order of their indices computes the same."""
    found = Groups(graph)
    order = {a: np.random.default_rng(a).permutation(int(found.dims.sizes[a])) for a in found.kinds}
    assert any((indices != np.sort(indices)).any() for indices in order.values())
    assert difference(logits_of(shrink(graph, found.coupling, order)), logits_of(graph)) <= 1e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_type in SQUARE], ids=lambda f: f.model_type)
def test_a_stream_that_its_heads_do_not_fill_has_no_configuration(family: cases.Family, tmp_path: Path) -> None:
    graph = family_graph(family)
    small = prune(graph, plan_of(graph, "hidden"))
    with pytest.raises(xl.CheckpointError, match=r"32 channels of heads are left in a stream of 24; Graph\.save keeps"):
        small.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}], ids=str)
def test_embeddings_take_up_what_gemma_multiplies_them_by(changes: dict[str, Any], tmp_path: Path) -> None:
    """Before: embeddings times sqrt(32). Expected: files of 24 features hold them times sqrt(32 / 24)."""
    graph = graph_of(config_of(cases.GEMMA2, **changes))
    small = prune(graph, plan_of(graph, "hidden"))
    small.save_pretrained(tmp_path)
    again = xl.from_pretrained(tmp_path, max_len=16)
    before, after = (np.asarray(each.weights["embedding/embedding"]) for each in (small, again))
    np.testing.assert_allclose(after, before * np.sqrt(32 / 24), rtol=1e-6)
    assert difference(logits_of(again), logits_of(small)) <= 1e-5
