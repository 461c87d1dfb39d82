"""The contract of a derived step: any chunking and any mixture of rows equals the full forward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from tests.passes.decoding import decode, difference, fused, in_one_batch, stepped
from tests.variants import DECODERS, REFUSED, Variant, forward
from xlathe.errors import DeriveError, PassError
from xlathe.masks import NotCausal, plan_mask
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache

# how many tokens of texts 0, 1 and 2 each call reads: mixed prefill, single tokens, a row that waits, chunks that
# differ. Lengths are 12, 9 and 5.
SCHEDULE = [{0: 5, 1: 3}, {0: 1, 1: 1, 2: 1}, {2: 4}, {0: 1}, {0: 3, 1: 5}, {0: 1}, {0: 1}]


@pytest.mark.parametrize("variant", DECODERS, ids=str)
def test_any_mixture_of_rows_equals_the_forward(variant: Variant) -> None:
    graph = stepped(variant)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, variant.vocab, n) for n in (12, 9, 5)]
    found = decode(graph, texts, SCHEDULE, rows=[2, 0, 3], slots=min(16, variant.max_len))
    for logits, expected in zip(found, forward(variant)(in_one_batch(texts)), strict=True):
        assert difference(logits, expected[: len(logits)]) <= variant.rtol


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused_with_reason_and_line(variant: Variant) -> None:
    with pytest.raises(DeriveError) as refusal:
        stepped(variant)
    file, line = variant.refused_at
    assert re.search(variant.reason, str(refusal.value))
    assert f"{file}:{line}" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "window"), [("window_7", 7), ("window_16", 16), ("window_4096", 4096), ("rope_half", None)]
)
def test_windows_are_found_over_all_distances(name: str, window: int | None) -> None:
    (variant,) = (v for v in DECODERS if v.name == name)
    graph = stepped(variant)
    operations = [e for e in graph.jaxpr.eqns if e.primitive.name == "xlathe.cached_attention"]
    assert len(operations) == variant.layers
    assert {(e.params["window"], e.params["masked"], e.params["biased"]) for e in operations} == {
        (window, False, False)
    }


def test_a_long_window_hides_what_is_behind_it() -> None:
    """4,200 tokens through a window of 4,096: the step sees what the forward sees at the last token."""
    (variant,) = (v for v in DECODERS if v.name == "window_4096")
    tokens = np.random.default_rng(2).integers(0, variant.vocab, (1, 4200))
    assert difference(stepped(variant)(tokens)[:, -3:], forward(variant)(tokens)[:, -3:]) <= variant.rtol


def test_grouped_heads_are_cached_unrepeated() -> None:
    (variant,) = (v for v in DECODERS if v.name == "repeat_gqa")
    graph = stepped(variant)
    assert [graph.aval(name).shape[2:] for name in graph.names("state")] == [(2, 8)] * 4
    assert "256 bytes a token" in graph.history[-1].notes


def test_a_step_is_not_derived_twice() -> None:
    with pytest.raises(PassError, match="already is an incremental step"):
        KVCache()(stepped(DECODERS[2]))


def test_tokens_mixed_by_a_user_function_are_refused_at_its_line() -> None:
    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens]
        x = x - x.mean(axis=1, keepdims=True)
        return x @ params["embed"].T

    graph = xlathe.trace(model, params={"embed": np.ones((5, 4), np.float32)}, max_len=8)
    with pytest.raises(DeriveError, match=r"reduce_sum reduces the token axis at .*test_kv_cache\.py:\d+ "):
        KVCache()(graph)


def test_a_window_on_both_sides_is_refused() -> None:
    """`local_window_size` without `is_causal` lets a token see later ones."""

    def model(params: dict, tokens: jnp.ndarray) -> jnp.ndarray:
        x = params["embed"][tokens][:, :, None]
        x = jax.nn.dot_product_attention(x, x, x, local_window_size=3)
        return x[:, :, 0] @ params["embed"].T

    graph = xlathe.trace(model, params={"embed": np.ones((5, 4), np.float32)}, max_len=16)
    with pytest.raises(DeriveError, match="lets the token at position 0 see the later one at 1"):
        KVCache()(FuseAttention()(Canonicalize()(graph)))


def test_masks_by_position() -> None:
    """What `plan_mask` says of masks written out in NumPy terms."""

    def of(mask: object, bias: object = None, length: int = 700) -> object:
        return plan_mask(lambda q, k: (mask(q, k), None if bias is None else bias(q, k)), length)

    assert of(lambda q, k: q[:, None] >= k).window is None
    windowed = of(lambda q, k: (q[:, None] >= k) & (q[:, None] - k < 300))
    assert (windowed.window, windowed.exact, windowed.biased) == (300, True, False)
    dilated = of(lambda q, k: (q[:, None] >= k) & ((q[:, None] - k) % 2 == 0))
    assert not dilated.exact
    blocks = of(lambda q, k: (q[:, None] >= k) & (q[:, None] // 64 == k // 64))
    assert not blocks.exact
    alibi = of(lambda q, k: q[:, None] >= k, lambda q, k: -0.5 * jnp.abs(q[:, None] - k))
    assert (alibi.exact, alibi.biased) == (True, True)
    additive = of(lambda q, k: jnp.ones((q.size, k.size), bool), lambda q, k: jnp.where(q[:, None] >= k, 0.0, -1e9))
    assert (additive.window, additive.exact, additive.biased) == (None, True, False)
    with pytest.raises(NotCausal, match="position 600 see the later one at 601"):
        of(lambda q, k: (q[:, None] >= k) | ((q[:, None] == 600) & (k == 601)))
    with pytest.raises(NotCausal, match="position 0 see no key"):
        of(lambda q, k: q[:, None] > k)
    with pytest.raises(NotCausal, match="position 0 see the later one at 1"):  # deep, but the same everywhere
        of(lambda q, k: jnp.ones((q.size, k.size), bool), lambda q, k: -2e4 - 0.1 * jnp.abs(q[:, None] - k))


def test_fused_graph_stays_callable_and_equal() -> None:
    variant = DECODERS[3]
    tokens = np.random.default_rng(3).integers(0, variant.vocab, (2, 6))
    assert difference(KVCache()(fused(variant))(tokens), fused(variant)(tokens)) <= variant.rtol
