"""Projections of a latent move out of attention where the cache then shrinks, and the numbers stay."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import graphs
from tests.passes.decoding import difference, fused, stepped
from tests.variants import DECODERS
from tests.variants.latent import LATENT, PLAIN, ROTARY, VALUE
from xlathe.absorb import absorb_projections
from xlathe.graph import Graph
from xlathe.ops.write_slots import quantize_heads
from xlathe.passes.cache_layout import CacheLayout
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.passes.quantize.quantize import Quantize

HEADS, HEAD = 4, 8


def attentions(graph: Graph) -> list[list[tuple[int, ...]]]:
    """The shapes of queries, keys and values of each attention, without batch and tokens."""
    found = [e for e in graph.jaxpr.eqns if e.primitive.name == "xlathe.attention"]
    return [[tuple(map(int, a.aval.shape[2:])) for a in e.invars[:3]] for e in found]


def model(project: Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]], latent: int) -> Graph:
    """One attention whose keys and values [b, t, h, d] `project` makes of a latent [b, t, latent]."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (11, latent), "query": (latent, HEADS * HEAD), "key": (latent, HEADS, HEAD),
              "value": (latent, HEADS, HEAD), "bias": (HEADS, HEAD)}  # fmt: skip
    params = {name: rng.normal(size=shape).astype(np.float32) / latent**0.5 for name, shape in shapes.items()}

    def forward(p: dict, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(p["embed"][tokens])
        q = (x @ p["query"]).reshape(*x.shape[:2], HEADS, HEAD)
        k, v = project(p, x)
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        return out.reshape(*x.shape[:2], -1) @ p["query"].T @ p["embed"].T

    return FuseAttention()(Canonicalize()(graphs.graph_of(forward, **params)))


def of_one_latent(p: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.einsum("btc,chd->bthd", x, p["key"]), jnp.einsum("btc,chd->bthd", x, p["value"])


def test_before_and_after() -> None:
    """Before: keys and values [4, 8] from a latent of 6. Expected: one key of 6, which is the value as well."""
    before = model(of_one_latent, latent=6)
    after, notes, misses = absorb_projections(before)
    assert attentions(before) == [[(4, 1, 8), (4, 8), (4, 8)]]
    assert attentions(after) == [[(1, 4, 6), (1, 6), (1, 6)]]
    assert notes == ("24 bytes a token in place of 256: the projections of a latent are absorbed",)
    assert misses == ()
    assert after.aval("key.keys").shape == after.aval("value.values").shape == (4, 8, 6)
    assert not {"key", "value"} & set(after.names("weight"))
    assert after.weights.trained("key.keys") == ("key",)
    tokens = np.random.default_rng(1).integers(0, 11, (2, 7))
    assert difference(after(tokens), before(tokens)) <= 1e-5


@pytest.mark.parametrize(
    ("project", "latent"),
    [
        (of_one_latent, 32),  # the latent is as wide as the keys: 128 bytes in place of 256
        (lambda p, x: (of_one_latent(p, x)[0] + p["bias"], of_one_latent(p, x)[1]), 6),  # keys are no projection alone
        (lambda p, x: (jnp.sin(of_one_latent(p, x)[0]), of_one_latent(p, x)[1]), 6),
    ],
    ids=["too wide", "a bias", "not linear"],
)
def test_what_stays(project: Callable, latent: int) -> None:
    before = model(project, latent)
    assert absorb_projections(before) == (before, (), ())


def test_a_quantized_projection_stays_and_is_reported() -> None:
    before = Quantize("int8", weights="key|value")(model(of_one_latent, latent=6))
    after, notes, misses = absorb_projections(before)
    assert (after, notes) == (before, ())
    assert misses == (
        "256 bytes a token where 24 would do, of a latent: key.codes is quantized; derive the cache first (KVCache "
        "before Quantize)",
    )
    assert KVCache()(before).history[-1].misses == misses


def test_another_latent_for_values_is_kept_beside_the_keys() -> None:
    def project(p: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return of_one_latent(p, x)[0], jnp.einsum("btc,chd->bthd", jnp.square(x), p["value"])

    before = model(project, latent=6)
    after, *_ = absorb_projections(before)
    assert attentions(after) == [[(1, 4, 6), (1, 6), (1, 6)]]
    tokens = np.random.default_rng(1).integers(0, 11, (2, 7))
    assert difference(after(tokens), before(tokens)) <= 1e-5


def decoder(arrange: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], bias: bool) -> Callable:
    """Two key-value heads for four queries, a rotary part of two, one weight [6, 2 * (8 + 5)] for keys and values.

    arrange: (product [b, t, 26], rotary [b, t, 2]) -> keys [b, t, 2, 10], the rotary part first, and values [b, t, 2,
        5].
    """

    def forward(p: dict, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(p["embed"][tokens])
        b, t, _ = x.shape
        position = jnp.arange(t)
        q = (x @ p["query"]).reshape(b, t, 2, 2, 10)
        k, v = arrange(x @ p["up"], jnp.sin(x[..., :2] * position[:, None]))
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
        if bias:
            slopes = 2.0 ** -jnp.arange(1, 5).reshape(2, 2)
            scores = scores - slopes[:, :, None, None] * jnp.abs(position[:, None] - position)
        scores = jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
        return out.reshape(b, t, -1) @ p["out"] @ p["embed"].T

    return forward


def head_by_head(up: jax.Array, rotary: jax.Array) -> tuple[jax.Array, jax.Array]:
    heads = up.reshape(*up.shape[:2], 2, 13)
    copies = jnp.broadcast_to(rotary[:, :, None], (*up.shape[:2], 2, 2))
    return jnp.concatenate([copies, heads[..., :8]], axis=-1), heads[..., 8:]


def values_first(up: jax.Array, rotary: jax.Array) -> tuple[jax.Array, jax.Array]:
    v, k = jnp.split(up, [10], axis=-1)
    k = jnp.concatenate([k.reshape(*up.shape[:2], 2, 8), jnp.stack([rotary, rotary], axis=2)], axis=-1)
    return jnp.roll(k, 2, axis=-1), v.reshape(*up.shape[:2], 2, 5)


def features_before_heads(up: jax.Array, rotary: jax.Array) -> tuple[jax.Array, jax.Array]:
    turned = up.reshape(*up.shape[:2], 13, 2).transpose(0, 1, 3, 2)
    return head_by_head(turned.reshape(up.shape), rotary)


def rotary_between(up: jax.Array, rotary: jax.Array) -> tuple[jax.Array, jax.Array]:
    k, v = head_by_head(up, rotary)
    return jnp.concatenate([k[..., 2:5], k[..., :2], k[..., 5:]], axis=-1), v


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias by head"])
@pytest.mark.parametrize("arrange", [head_by_head, values_first, features_before_heads, rotary_between])
def test_however_heads_are_arranged(arrange: Callable, bias: bool) -> None:
    """Before: two keys of 10 and values of 5. Expected: one key of 6 + 2; the step equals the author's forward."""
    rng = np.random.default_rng(2)
    shapes = {"embed": (11, 6), "query": (6, 40), "up": (6, 26), "out": (20, 6)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    author = decoder(arrange, bias)
    step = KVCache()(FuseAttention()(Canonicalize()(graphs.graph_of(author, **params))))
    assert [step.aval(name).shape[2:] for name in step.names("state")] == [(1, 8)]
    tokens = rng.integers(0, 11, (2, 7))
    assert difference(step(tokens), author(params, tokens)) <= 1e-5


def test_layers_may_be_views_of_one_stacked_weight() -> None:
    """Before: layers read `up[0]` and `up[1]`. Expected: each gets parts of its own."""

    def author(p: dict, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(p["embed"][tokens])
        for i in range(2):
            k = v = jnp.einsum("btc,chd->bthd", x, p["up"][i])
            q = (x @ p["query"]).reshape(k.shape)
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
            out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
            x = jnp.tanh(x + out.reshape(*x.shape[:2], -1) @ p["out"])
        return x @ p["embed"].T

    rng = np.random.default_rng(3)
    shapes = {"embed": (11, 6), "query": (6, 32), "up": (2, 6, 4, 8), "out": (32, 6)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    step = KVCache()(FuseAttention()(Canonicalize()(graphs.graph_of(author, **params))))
    assert [step.aval(name).shape[2:] for name in step.names("state")] == [(1, 6)] * 2
    tokens = rng.integers(0, 11, (2, 7))
    assert difference(step(tokens), author(params, tokens)) <= 1e-5


def test_narrow_numbers_are_multiplied_in_float32() -> None:
    def project(p: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        narrow = {name: array.astype(jnp.bfloat16) for name, array in p.items()}
        return of_one_latent(narrow, x.astype(jnp.bfloat16))

    before = model(project, latent=6)
    step = KVCache()(before)
    tokens = np.random.default_rng(1).integers(0, 11, (2, 7))
    assert difference(step(tokens), before(tokens)) <= 2e-2


def test_a_latent_kept_in_8_bits_is_read_in_8_bits() -> None:
    """Before: keys and values of a latent that is rounded in the model. Expected: the same from a cache of codes."""

    def of_rounded(p: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, scale = quantize_heads(x)
        return of_one_latent(p, codes * scale[..., None])

    tokens = np.random.default_rng(1).integers(0, 11, (2, 7))
    step = CacheLayout("paged", page=8, dtype="int8")(KVCache()(model(of_one_latent, latent=6)))
    assert difference(step(tokens), model(of_rounded, latent=6)(tokens)) <= 1e-5


@pytest.mark.parametrize("name", ["latent_and_rotary_key", "latent_in_two_products"])
def test_the_cache_holds_latent_and_rotary_key_alone(name: str) -> None:
    """Before: 4 heads of keys of 12 and values of 6. Expected: 12 + 4 numbers a token and layer, in every layout."""
    (variant,) = (v for v in DECODERS if v.name == name)
    assert attentions(fused(variant)) == [[(4, 1, PLAIN + ROTARY), (4, PLAIN + ROTARY), (4, VALUE)]] * variant.layers
    step = stepped(variant)
    assert [step.aval(n).shape[2:] for n in step.names("state")] == [(1, LATENT + ROTARY)] * variant.layers
    assert f"{variant.layers * (LATENT + ROTARY) * 4} bytes a token" in step.history[-1].notes
    paged = CacheLayout("paged", page=16, dtype="int8")(step)
    caches = [n for n in paged.names("state") if n.endswith(".codes")]
    assert [paged.aval(n).shape[2:] for n in caches] == [(1, LATENT + ROTARY)] * variant.layers
