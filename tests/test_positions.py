"""Values made from positions: what a step may compute for a token on its own, and what it must refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.graphs import graph_of, relative
from tests.passes.decoding import decode
from xlathe.errors import DeriveError
from xlathe.passes.kv_cache import KVCache

V, D, HEADS, MAX_LEN = 11, 8, 2, 16
RNG = np.random.default_rng(0)
PARAMS = {
    "e": RNG.normal(size=(V, D)).astype(np.float32),
    "pos": RNG.normal(size=(MAX_LEN, D)).astype(np.float32),
    "tables": RNG.normal(size=(3, MAX_LEN + 4, D)).astype(np.float32),
}
SCHEDULE = [{0: 3, 1: 2}, {1: 4}, {0: 1}, {0: 2, 1: 1}]


def model_of(add):
    """Embeds tokens, adds something to them, and reads them out."""
    return lambda params, ids: add(params, params["e"][ids]) @ params["e"].T


def merged_as_tokens(p, x):
    b, t, _ = x.shape
    table = jnp.broadcast_to(p["pos"][:t], (b, t, D)).reshape(b * t, D)
    return (x.reshape(b * t, D) + table).reshape(b, t, D)


def merged_features(p, x):
    b, t, _ = x.shape
    return (x.reshape(b, t * D) + p["pos"][:t].reshape(t * D)).reshape(b, t, D)


def spread_over_merged(p, x):
    b, t, _ = x.shape
    return (x.reshape(b * t, D) * jnp.broadcast_to(p["pos"][0], (b * t, D))).reshape(b, t, D)


def barrier(p, x):
    position, table = lax.optimization_barrier((jnp.arange(x.shape[1]) * 0.1, p["pos"][: x.shape[1]]))
    return x + table + position[:, None]


FOLLOWED = {
    "merged in the order of the tokens": merged_as_tokens,
    "merged with features": merged_features,
    "spread over a merged axis": spread_over_merged,
    "a barrier around two values": barrier,
    "a window from the start": lambda p, x: x + lax.dynamic_slice(p["pos"], (0, 0), (x.shape[1], D)),
    "a window that fits": lambda p, x: x + lax.dynamic_slice_in_dim(p["tables"][1], 4, x.shape[1]),
    "a window of a row of a table": lambda p, x: x + p["tables"][2, 3 : x.shape[1] + 3],
    "every second entry": lambda p, x: x + jnp.tile(p["pos"], (2, 1))[: 2 * x.shape[1] : 2],
    "tiled over rows": lambda p, x: x + jnp.tile(p["pos"][: x.shape[1]], (x.shape[0], 1, 1)),
}


def of_another_order(p, x):
    b, t, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(t)[:, None], (t, b)).reshape(t * b)
    return (x.reshape(b * t, D) + positions[:, None]).reshape(b, t, D)


def features_of_another_order(p, x):
    b, t, _ = x.shape
    flat = x.transpose(0, 2, 1).reshape(b, D * t) + p["pos"][:t].reshape(t * D)
    return flat.reshape(b, D, t).transpose(0, 2, 1)


def paired_in_another_order(p, x):
    b, t, _ = x.shape
    scale = jnp.broadcast_to(p["pos"][:t, None], (t, b, D)).reshape(t * b, D)
    return jnp.einsum("nd,nd->nd", x.reshape(b * t, D), scale).reshape(b, t, D)


def joined_in_another_order(p, x):
    b, t, _ = x.shape
    table = jnp.broadcast_to(p["pos"][:t, None], (t, b, D)).reshape(t * b, D)
    return jnp.concatenate([x.reshape(b * t, D)[:, :4], table[:, 4:]], axis=1).reshape(b, t, D)


def rows_and_positions_exchanged(p, x):
    b, t, _ = x.shape
    return x + jnp.broadcast_to(jnp.arange(t), (b, t)).reshape(t, b).T[:, :, None]


def spaced(p, x):
    t = x.shape[1]
    return lax.pad(x, 0.0, ((0, 0, 0), (0, 1 - t, 1), (0, 0, 0)))


REFUSED = {
    "rows are counted": (lambda p, x: x + jnp.arange(x.shape[0])[:, None, None], "iota counts the rows"),
    "tokens of all rows are counted": (
        lambda p, x: x + jnp.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], 1),
        "reshapes across|does not follow",
    ),
    "features of all tokens are counted": (
        lambda p, x: x + jnp.arange(x.shape[1] * D).reshape(x.shape[1], D),
        "reshapes across|does not follow",
    ),
    "rows are summed up": (
        lambda p, x: x + jnp.cumsum(jnp.ones((x.shape[0], 1, 1)), axis=0),
        "accumulates over the rows",
    ),
    "another order of tokens": (of_another_order, "add combines .* merged .* in different orders"),
    "another order of features": (features_of_another_order, "add combines .* merged .* in different orders"),
    "another order of factors": (paired_in_another_order, "(mul|dot_general) combines .* in different orders"),
    "another order of parts": (joined_in_another_order, "concatenate combines .* in different orders"),
    "rows and positions exchanged": (rows_and_positions_exchanged, "reshapes across|does not follow"),
    "a window that is moved": (
        lambda p, x: x + lax.dynamic_slice(p["pos"], (5, 0), (x.shape[1], D)),
        "from 5 on leaves a table of 16 in rows of up to 16",
    ),
    "spaced tokens": (spaced, "pad takes a part of, or shifts, the token axis"),
    "numbers in parts": (
        lambda p, x: x + lax.bitcast_convert_type(x, jnp.uint8).sum(-1),
        "bitcast_convert_type takes numbers apart",
    ),
    "a token at every position": (
        lambda p, x: x + jnp.take(x, jnp.arange(x.shape[1]) % D, axis=2).sum(-1, keepdims=True),
        "looks every token up at every other",
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_equals_the_forward(name):
    model = model_of(FOLLOWED[name])
    step = KVCache()(graph_of(model, max_len=MAX_LEN, **PARAMS))
    texts = [RNG.integers(0, V, n) for n in (6, 7)]
    for text, found in zip(texts, decode(step, texts, SCHEDULE, rows=[1, 0], slots=MAX_LEN), strict=True):
        assert relative(found, model(jax.tree.map(jnp.asarray, PARAMS), text[None])[0]) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    add, reason = REFUSED[name]
    with pytest.raises(DeriveError, match=rf"(?:{reason}).* at .*test_positions\.py:\d+"):
        KVCache()(graph_of(model_of(add), max_len=MAX_LEN, **PARAMS))


def test_selected_tokens_of_a_merged_axis():
    """Keys are needed of all tokens and queries of the selected ones; both are made from [b * t * heads, d]."""

    def model(p, ids):
        b, t = ids.shape
        y = p["e"][ids].reshape(b * t * HEADS, D // HEADS)
        q, k = (z.reshape(b, t, HEADS, D // HEADS).transpose(0, 2, 1, 3) for z in (y, jnp.tanh(y)))
        scores = jnp.where(jnp.tri(t, dtype=bool), q @ k.swapaxes(2, 3), -jnp.inf)
        out = (jax.nn.softmax(scores) @ k).transpose(0, 2, 1, 3).reshape(b, t, D)
        return out @ p["e"].T

    from xlathe.passes.fuse_attention import FuseAttention
    from xlathe.step import empty_state, run_step

    step = KVCache()(FuseAttention()(graph_of(model, max_len=MAX_LEN, e=PARAMS["e"])))
    ids = RNG.integers(0, V, (1, 6), dtype=np.int32)
    args = {"tokens": ids[0], "positions": np.arange(6), "rows": np.zeros(6), "select": np.array([1, 5])}
    logits, _ = run_step(step, {k: v.astype(np.int32) for k, v in args.items()}, empty_state(step, 1, MAX_LEN))
    assert relative(logits, model({"e": jnp.asarray(PARAMS["e"])}, ids)[0, [1, 5]]) < 1e-5
